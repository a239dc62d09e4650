"""One adapter a venue: raw recordings → canonical messages on a tape."""
