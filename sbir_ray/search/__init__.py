"""Draw a thing, find its photo: trained networks over photos of one's own."""
