"""AlexNet's best-known failure: a loss that stays at that of guessing."""

STUCK_STEPS = 50  # from then on a loss that is not below ln(classes) is worth a word
STUCK_MARGIN = 0.01
STUCK_REMEDIES = {
    "paper": "The paper's initialisation can lie still for long on small data; "
    "the remedy is --init he --pixel-scale 0.0156",
    "he": "If that lasts, another --lr may wake it: the paper's, 0.01, is meant for batches of 128",
}
