"""Ports: a model of one framework takes the parameters of a model of another."""
