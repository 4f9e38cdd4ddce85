"""What is drawn or shown: a picture of a network, the demo."""
