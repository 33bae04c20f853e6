"""What a sketch, a photo and a pair are: their forms in memory, in files and on the canvas."""
