def predict():
    "t"


def fill_mask():
    "t"


def encode():
    "t"
