"""What people look at: figures, maps, attention, widgets."""
