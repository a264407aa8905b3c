"""data/labelling"""
