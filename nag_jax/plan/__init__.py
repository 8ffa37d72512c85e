"""What a program needs of machines that are not there: topologies, collectives in compiled text, the roofline.

Nothing here knows training or sampling; `jobs/plan.py` puts the two together.
"""
