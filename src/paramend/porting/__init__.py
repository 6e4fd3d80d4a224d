"""A model of one framework in another: which weight goes where, and the proof that both compute the same."""
