"""A collator: which documents a row is made of. Here short conversations come first in the first epoch."""

import numpy as np

from chattrain.data.collators import Padded


class ShortFirst(Padded):
    def _document(self, row):
        if not 0 <= row < self.mixture.epoch_size:
            return super()._document(row)
        order = self.mixture.order(0)
        return int(order[np.argsort(self.mixture.lengths[order], kind="stable")[row]])
