"""permutation"""
