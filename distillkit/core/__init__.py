"""The method.  Read in this order: students, distilled, inner, problem, metagrad, objectives, experts, distiller."""
