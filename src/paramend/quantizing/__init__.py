"""Weights in another code: quantised ones as floats, and floats as a scheme would have them."""
