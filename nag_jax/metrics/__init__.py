"""Numbers that judge samples: distances between sets of images, and the feature nets they are computed on.

`features` turns images into feature vectors, `frechet` turns feature vectors into a distance with an
interval. Nothing here knows how the images were made.
"""
