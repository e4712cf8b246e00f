"""text -> conversation -> tokens and mask -> cached arrays -> rows -> Batch; each arrow is one module, and none goes back."""
