"""The whole path on images that need no download: `digits` with their `network`, `photos`, and a picture (`grid`)."""
