"""What attention weights say of whole stacks of blocks.

Shape letters: L layers, H heads, T tokens.
"""

import numpy as np


def rollout(weights_LxHxTxT: np.ndarray) -> np.ndarray:
    """Return the attention rollout (Abnar 2020, section 3) after each layer, float64 [L, T, T].

    Row t says how much token t of that layer's output is made of each token that entered the first layer; it sums to
    one. Heads are averaged, and residual connections count as much as attention.
    """
    length = weights_LxHxTxT.shape[-1]
    mixed_LxTxT = (weights_LxHxTxT.astype(np.float64).mean(axis=1) + np.eye(length)) / 2
    mixed_LxTxT /= mixed_LxTxT.sum(axis=-1, keepdims=True)  # float32 weights sum to one only nearly
    rolled = [mixed_LxTxT[0]]
    for mixed_TxT in mixed_LxTxT[1:]:
        rolled.append(mixed_TxT @ rolled[-1])
    return np.stack(rolled)


def row(matrix_TxS: np.ndarray, position: int | None, real_T: np.ndarray | None = None) -> np.ndarray:
    """Return the row [S] of a position of a matrix, or where it is None the mean of those that are real."""
    if position is not None:
        return matrix_TxS[position]
    return matrix_TxS.mean(axis=0) if real_T is None else matrix_TxS[real_T].mean(axis=0)
