"""The method.  Read in this order: students, distilled, inner, metagrad, objectives, experts, distiller."""
