"""Numbers that judge samples: distances between sets of feature vectors, and what they share. How the samples were made
is not known here.

features                    images to feature vectors by a feature net
accumulate                  mean and covariance of a stream of them, block by block on the devices
reference                   files of statistics and images of real data
frechet, extrapolation      the Fréchet distance (FID, sFID), and what it tends to with more samples
manifold                    precision, recall, density, coverage
inception_score             the Inception Score of class logits
kernel_distance             the kernel distance (KID)
bootstrap, blocks, checks   intervals; rows on a mesh; what is asked of vectors
"""
