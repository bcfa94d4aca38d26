"""Signals: torch in, 0-dim tensors or plain numbers out; pure functions that never read the device and never draw random numbers.

| series | what | read in |
| --- | --- | --- |
| `loss` | the batch's training loss, undivided | `on_train_batch_end` |
| `loss/<name>` | further losses: other keys of a returned dict, `loss/backward<k>` for the k-th manual backward | the same |
| `grad_norm` | total L2 norm of the gradients, synchronised, unscaled, unclipped | `on_before_optimizer_step` |
| `grad_norm/after_clip` | the same after clipping, where clipping is in play | `on_train_batch_end` |
| `grad_norm` (vector) | the norm of every parameter's gradient | `on_before_optimizer_step` |
| `lr-<optimizer>`, `lr-<optimizer>/pg<k>` | the learning rate that the update used, as LearningRateMonitor names it | the same |
| `batch/<leaf>/<statistic>` | mean, std, max_abs, nonfinite, zeros of a floating tensor of the batch | `on_train_batch_start` |
"""
