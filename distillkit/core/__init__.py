"""The method.

Read in this order: student, loading, distilled, optimizers, inner, problem, metagrad, objectives, experts, distiller.
"""
