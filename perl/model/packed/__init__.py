"""model/packed"""
