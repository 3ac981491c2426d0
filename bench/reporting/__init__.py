"""What bench/report.py is made of: each kind of table or picture, and the words and looks that they share."""
