"""Signals: pure functions from torch to 0-dim tensors or plain numbers, without device reads or random draws.

They are recorded by the monitors in `callbacks/` and the participants in `record/`.

| series | meaning | read in |
| --- | --- | --- |
| `loss` | training loss of the batch, undivided | `on_train_batch_end` |
| `loss/<name>` | other losses: keys of a returned dict, `loss/backward<k>` for the k-th manual backward pass | the same |
| `grad_norm` (and vector) | L2 norm of the gradients, synchronised, unscaled, unclipped | `on_before_optimizer_step` |
| `grad_norm/after_clip` | the same after clipping | `on_train_batch_end` |
| `lr-<optimizer>`, `lr-<optimizer>/pg<k>` | learning rate of the update, as in LearningRateMonitor | `on_before_optimizer_step` |
| `batch/<leaf>/<statistic>` | mean, std, max_abs, nonfinite, zeros of a floating tensor | `on_train_batch_start` |
| `batch/<target>/<statistic>` | distinct, entropy, largest, longest_run, histogram of an integer target or input | the same |
| `batch/<weight>/ess`, `max_share` | effective sample size as a share, largest share of one sample weight | the same |
| `batch/<input>/drift` | inputs' moving average against the first batches, in standard errors | the same |
| `activation_max`, `_rms`, `_zeros`, `_dead`, `_saturated` (vectors) | size, flat elements and dead units of modules | `on_train_batch_end`, sampled |
| `weight_norm` (and vector), `weight_max`, `initial_scale` (vectors) | size of weights; first scale over 1 / sqrt(fan-in) | the same |
| `update_norm` (and vector), `update_norm/none` | L2 norm of an update; 1 if it changed nothing | around the optimizer's step, sampled |
| `update_rms`, `eps_share` (and vectors), `momentum_cosine` | gradient over second moment, sqrt(v) over eps, gradient against momentum | the same |
| `grad_norm/leftover` | gradients left from the last update | `on_before_backward` |
| `loss_scale`, `skipped_step` | state of the gradient scaler | every update |
| `grad_zeros`, `grad_underflow` | share of gradient entries that are 0, or underflow in half precision | sampled |
| `ranks/weights`, `ranks/gradients` (vectors) | checksums under DDP | sampled |
"""
