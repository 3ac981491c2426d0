"""Images of Counting Polygons: how they are drawn, and the network that reads their objects."""
