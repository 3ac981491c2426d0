"""What refinement does to a model's samples: counted, with intervals, and pictured."""
