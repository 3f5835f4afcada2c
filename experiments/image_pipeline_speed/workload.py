"""What both sides do, and how much of it is timed. Nothing but the standard library, as both environments read it."""

SIZE, LAYERS, MAGNITUDE = 224, 2, 10  # pixels; RandAugment's, of at most 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE, WARM_BATCHES = 32, 4
REPEATS = 64  # how often each file is there: shuffling so few as there are files is not what a data set costs
