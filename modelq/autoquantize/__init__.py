"""AutoQuantize: a format for every layer, within a budget of bits. What is searched is anything that `candidates.Subject` describes."""
