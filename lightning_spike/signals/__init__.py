"""Signals: torch in, 0-dim tensors or plain numbers out.

Pure functions that never read the device and never draw random numbers.

| series | what | read in |
| --- | --- | --- |
| `loss` | the batch's training loss, undivided | `on_train_batch_end` |
| `loss/<name>` | further losses: other keys of a returned dict, `loss/backward<k>` for the k-th manual backward | the
same |
| `grad_norm` | total L2 norm of the gradients, synchronised, unscaled, unclipped | `on_before_optimizer_step` |
| `grad_norm/after_clip` | the same after clipping, where clipping is in play | `on_train_batch_end` |
| `grad_norm` (vector) | the norm of every parameter's gradient | `on_before_optimizer_step` |
| `lr-<optimizer>`, `lr-<optimizer>/pg<k>` | the learning rate that the update used, as LearningRateMonitor names it |
the same |
| `batch/<leaf>/<statistic>` | mean, std, max_abs, nonfinite, zeros of a floating tensor of the batch |
`on_train_batch_start` |
| `batch/<target>/<statistic>` | distinct, entropy, largest, longest_run of an integer target or input; as a vector
histogram | the same |
| `batch/<weight>/ess`, `max_share` | effective sample size as a share, largest share of one sample weight | the same |
| `batch/<input>/drift` | how far the inputs' moving average lies from the run's first batches, in standard errors | the
same |
| `activation_max`, `_rms`, `_zeros`, `_dead`, `_saturated` (vectors) | sizes, flat elements and dead units of modules |
`on_train_batch_end`, sampled |
| `weight_norm` (and vector), `weight_max`, `initial_scale` (vectors) | sizes of weights; first scale over 1 /
sqrt(fan-in) | the same |
| `update_norm` (and vector), `update_norm/none` | L2 norm of an update; 1 where it changed nothing though it should |
around the optimizer's step, sampled |
| `update_rms`, `eps_share` (and vectors), `momentum_cosine` | gradient against second moment, sqrt(v) against eps,
gradient against momentum | the same |
| `grad_norm/leftover` | what is left of the last update's gradients when a backward pass begins, where any is |
`on_before_backward` |
| `loss_scale`, `skipped_step` | of the gradient scaler | every update |
| `grad_zeros`, `grad_underflow` | share of gradient entries that are 0, or too small for half precision | sampled |
| `ranks/weights`, `ranks/gradients` (vectors) | checksums under DDP | sampled |
"""
