"""Decide what is worth training, by measured gains and drift of fresh data. Pure; the clock is an argument."""
