"""Text made up for the tests."""

import random

SUBJECTS = ["the cat", "a small dog", "my neighbour", "the old engine", "every river", "some clouds", "one teacher"]
VERBS = ["sees", "follows", "remembers", "paints", "answers", "carries", "forgets", "measures"]
OBJECTS = ["the moon", "a green door", "two letters", "the naïve question", "her garden", "a bridge, slowly"]


def sentences(n, seed=0):
    """Sentences of about eight words."""
    rng = random.Random(seed)
    return [f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}.".capitalize() for _ in range(n)]


def documents(n, seed=0, longest=40):
    """Documents of 1 to ``longest`` sentences, a sentence in each line."""
    rng = random.Random(seed)
    return ["\n".join(sentences(rng.randint(1, longest), seed=rng.random())) for _ in range(n)]
