"""Trains timm's DenseNet on the digits with PyTorch and writes train_parity.npz beside this script.

    python tests/golden/make_train_parity.py

needs torch 2.13, torchvision, timm 1.0.31 (any CPU build) and scikit-learn; about a minute. The settings are those of
train_case.py; run it again when they change.

Written, in float64: the training loss of every step, loss and accuracy on the held-out digits every 50 steps; and, for
the test to judge float32 by, how far PyTorch's own float32 runs stray from that: one from the same weights, and more
from weights moved by at most one unit in the last place, as another order of the same sums would move them.
"""

from pathlib import Path

import numpy as np
import torch
import train_case as case

_register_fake = torch.library.register_fake


def _skip_torchvision(name, *args, **kwargs):
    """A CPU build of torch lacks torchvision's compiled operators; nothing here needs them."""
    if isinstance(name, str) and name.startswith("torchvision::"):
        return lambda function: function
    return _register_fake(name, *args, **kwargs)


torch.library.register_fake = _skip_torchvision

from timm.models.densenet import DenseNet  # noqa: E402

NUDGED_RUNS = 9


def prepare(images, dtype):
    """Normalized [b, c, h, w]."""
    scaled = (torch.from_numpy(images).to(torch.float64) / 255.0 - case.MEAN[0]) / case.STD[0]
    return scaled.permute(0, 3, 1, 2).to(dtype).contiguous()


def make_model(dtype, run):
    """The model with its initial weights; in runs after the first each is moved by up to 2^-23 of itself."""
    model = DenseNet(
        growth_rate=case.GROWTH_RATE,
        block_config=case.BLOCK_SIZES,
        num_classes=case.CLASSES,
        in_chans=1,
    ).to(dtype)
    state = model.state_dict()
    rng, nudge = np.random.default_rng(run), 2.0**-23 if run else 0.0
    for key, value in state.items():
        if value.dtype.is_floating_point:
            array = case.initial(key, tuple(value.shape))
            array = array * (1 + nudge * rng.uniform(-1, 1, array.shape))
            value.copy_(torch.from_numpy(array))
    model.load_state_dict(state)
    return model


def evaluate(model, images, labels, dtype):
    """Mean loss without smoothing and accuracy, by running statistics."""
    model.eval()
    with torch.no_grad():
        logits = model(prepare(images, dtype)).double()
    model.train()
    targets = torch.from_numpy(labels)
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    return loss, (logits.argmax(1) == targets).double().mean().item()


def train(dtype, run=0):
    """Losses of all steps, and (loss, accuracy) on the held-out digits at each evaluation."""
    (images, labels), held_out = case.digits()
    model = make_model(dtype, run).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=case.LEARNING_RATE,
        momentum=case.MOMENTUM,
        nesterov=True,
        weight_decay=case.WEIGHT_DECAY,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, case.MILESTONE_STEPS, case.DECAY_FACTOR)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=case.LABEL_SMOOTHING)
    losses, evaluations = [], []
    for step, (batch, targets) in enumerate(case.batches(images, labels), 1):
        loss = criterion(model(prepare(batch, dtype)), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % case.EVAL_EVERY_STEPS == 0:
            evaluations.append(evaluate(model, *held_out, dtype))
    return np.array(losses), np.array(evaluations)


def main():
    torch.set_num_threads(1)
    losses, evaluations = train(torch.float64)
    strayed_losses, strayed_evaluations = [], []
    for run in range(1 + NUDGED_RUNS):
        other_losses, other_evaluations = train(torch.float32, run)
        strayed_losses.append(np.abs(other_losses - losses))
        strayed_evaluations.append(np.abs(other_evaluations - evaluations))
    np.savez_compressed(
        Path(__file__).with_name("train_parity.npz"),
        losses=losses,
        evaluations=evaluations,
        float32_loss_deviations=np.array(strayed_losses),
        float32_evaluation_deviations=np.array(strayed_evaluations),
    )
    print("loss", losses[[0, 1, 10, 50, 99, 150, 199]])
    print("held out", evaluations.tolist())
    print("float32 strays by run, at some steps, at most, and at the last evaluation")
    for deviations, evaluated in zip(strayed_losses, strayed_evaluations, strict=True):
        print(deviations[[0, 10, 20, 30, 50, 99, 150, 199]], deviations.max(), evaluated[-1])


if __name__ == "__main__":
    main()
