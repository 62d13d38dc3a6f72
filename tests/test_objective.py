"""The losses are those of REPA and REG, restricted to the kept tokens (Eq. 10 and 11)."""

import pytest
import torch
from draws import Given, given, numbers, scores_of
from golden_cases import assert_golden, ids, inputs, model
from test_method import batch, subset, trained_looking
from test_model import tiny
from torch.optim.swa_utils import get_ema_multi_avg_fn

from maskalign import SiTOutput, StepRng, add_noise, make_config, patchify, training_losses
from sample import from_official

SIZE = dict(data="x", num_classes=10, image_size=64, z_dim=16)
CONFIG = make_config(**SIZE)
UNMASKED = make_config(**SIZE, mask_ratio=0.0)


def drawn(n=3, num_tokens=16, **chosen):
    """Numbers for a step of n images of CONFIG, some of them chosen."""
    found = numbers(n, (4, 8, 8), z_dim=16, num_tokens=num_tokens)
    assert chosen.keys() <= found.keys()
    return found | chosen


def official_losses(sit, case, x, step=""):
    """REG's losses by our function.

    The golden cases give the diffused class token and the aligned one independently; ours are one.
    So the class token's noise is chosen, for the alignment term, such that c_t comes out the same.
    """
    config = make_config(data="x", method="reg" if sit.class_token else "repa", num_classes=10)
    x = {key.removeprefix(step): value for key, value in x.items() if key.startswith(step)}
    rand, feat = [x["t"], x["drop_rand"]], x["feat.0"]
    if not sit.class_token:
        z = torch.cat([torch.full_like(feat[:, :1], torch.nan), feat], 1)  # must not be read
        return training_losses(sit, x["images"], x["y"], z, config, Given(rand, [x["noise"]]))
    t, cls, noise = x["t"][:, None], x["cls_token"], x["noise_cls"]
    z = torch.cat([cls[:, None], feat[:, 1:]], 1)
    rng = Given(rand, [x["noise"], noise])
    losses = training_losses(sit, x["images"], x["y"], z, config, rng)
    moved = ((1 - t) * (cls - feat[:, 0]) + t * noise) / t
    rng = Given(rand, [x["noise"], moved])
    losses["align"] = training_losses(sit, x["images"], x["y"], feat, config, rng)["align"]
    losses["loss"] = losses["denoise"] + 0.03 * losses["cls"] + 0.5 * losses["align"]
    return losses


@ids("loss/", without=("haste", "sra"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_losses_and_gradients_equal_the_official_ones(case, dtype):
    sit = model(case, dtype)
    losses = official_losses(sit, case, inputs(case, dtype))
    assert_golden(losses["loss"], case, "total")
    assert_golden(losses["align"], case, "proj_loss")
    gold = case["outputs"]
    assert losses["denoise"].item() == pytest.approx(gold["denoising_loss"]["mean"], abs=1e-6)
    if sit.class_token:
        assert losses["cls"].item() == pytest.approx(gold["cls_loss"]["mean"], abs=1e-6)
    losses["loss"].backward()
    for name, p in sit.named_parameters():
        for official in [key for key in gold if key.startswith("grad.")]:
            if [name] == list(from_official({official.removeprefix("grad."): 0})):
                assert_golden(p.grad, case, official)


@ids("train_steps/")
def test_three_optimiser_steps_equal_the_official_ones(case):
    sit, x, optim = model(case), inputs(case), case["optimizer"]
    ema = {name: p.detach().clone() for name, p in sit.named_parameters()}
    start = {name: p.clone() for name, p in ema.items()}
    trained = [p for p in sit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, weight_decay=0.0)
    update_ema = get_ema_multi_avg_fn(CONFIG.ema_decay)
    totals, norms = [], []
    for step in range(case["n_steps"]):
        losses = official_losses(sit, case, x, f"step{step}/")
        optimizer.zero_grad()
        losses["loss"].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CONFIG.grad_clip))
        optimizer.step()
        update_ema(list(ema.values()), list(sit.parameters()), None)
        totals.append(losses["loss"].detach())
    assert optim["lr"] == CONFIG.lr and optim["ema_decay"] == CONFIG.ema_decay
    assert_golden(torch.stack(totals), case, "total_per_step")
    assert_golden(torch.stack(norms), case, "grad_norm_per_step")
    for name, p in sit.named_parameters():
        for official in case["outputs"]:
            kind, _, key = official.partition("delta.")
            if key and [name] == list(from_official({key: 0})):
                end = p.data if kind == "" else ema[name]
                assert_golden(end - start[name], case, official)


def test_identical_features_give_alignment_minus_one():
    x, _, y, _ = batch()
    z = torch.randn(3, 17, 16)

    def perfect(x_t, t, y, cls_t, ids_keep):
        keep = torch.cat([torch.zeros(3, 1, dtype=torch.long), ids_keep + 1], 1)
        z_kept = torch.stack([row[ids] for row, ids in zip(z, keep, strict=True)])
        return SiTOutput(torch.zeros(3, ids_keep.shape[1], 16), torch.zeros(3, 16), 3 * z_kept)

    losses = training_losses(perfect, x, y, z, CONFIG, given(drawn()))
    assert losses["align"].item() == pytest.approx(-1, abs=1e-6)


def test_a_perfect_velocity_gives_loss_zero():
    x, _, y, _ = batch()
    z, found = torch.randn(3, 17, 16), drawn()

    def perfect(x_t, t, y, cls_t, ids_keep):
        v = patchify(found["noise"] - x, 2)
        v = torch.stack([row[ids] for row, ids in zip(v, ids_keep, strict=True)])
        return SiTOutput(v, found["cls_noise"] - z[:, 0], None)

    losses = training_losses(perfect, x, y, z, CONFIG, given(found))
    assert losses["denoise"] == losses["cls"] == losses["align"] == losses["loss"] == 0


def test_velocity_is_the_derivative_of_the_path():
    """The model is shown x_t at two times; their slope is the target that it is held to."""
    x, _, y, _ = (part.double() if part.is_floating_point() else part for part in batch())
    z, seen = torch.randn(3, 17, 16).double(), []

    def spy(x_t, t, y, cls_t, ids_keep):
        seen.append((x_t, cls_t))
        slope = (seen[-1][0] - seen[0][0]) / 0.25, (seen[-1][1] - seen[0][1]) / 0.25
        return SiTOutput(patchify(slope[0], 2), slope[1], None)

    found = {name: value.double() for name, value in drawn(num_tokens=None).items()}
    for t in (0.5, 0.75):
        found["t"] = torch.full((3,), t).double()
        losses = training_losses(spy, x, y, z, UNMASKED, given(found))
    assert losses["denoise"] < 1e-24 and losses["cls"] < 1e-24


def test_time_zero_is_data_and_time_one_is_noise():
    x, _, y, _ = batch()
    found, shown = drawn(num_tokens=None), []

    def spy(x_t, t, y, cls_t, ids_keep):
        shown.append(x_t)
        return SiTOutput(torch.zeros(3, 16, 16), torch.zeros(3, 16), None)

    for t in (0.0, 1.0):
        found["t"] = torch.full((3,), t)
        training_losses(spy, x, y, torch.randn(3, 17, 16), UNMASKED, given(found))
    assert torch.equal(shown[0], x) and torch.equal(shown[1], found["noise"])


def test_dropped_tokens_are_neither_predicted_nor_aligned():
    """Without a mixer, nothing about a dropped token can change any loss or gradient."""
    sit, (x, _, y, _) = trained_looking(tiny(mixer_depth=0)).double().train(), batch()
    x, z = x.double(), torch.randn(3, 17, 16).double()
    keep = torch.arange(1, 16).expand(3, 15)
    config = make_config(**SIZE, mask_ratio=1 / 16)
    found = {name: value.double() for name, value in drawn().items()}
    found["scores"] = scores_of(keep, 16)
    found["noise"] = found["noise"].clone()
    runs = []
    for _ in range(2):
        sit.zero_grad()
        losses = training_losses(sit, x, y, z, config, given(found))
        losses["loss"].backward()
        runs.append((losses, [p.grad for p in sit.parameters() if p.requires_grad]))
        x[:, :, :2, :2], found["noise"][:, :, :2, :2], z[:, 1] = 9.0, -9.0, 9.0
    (one, grads), (two, others) = runs
    assert one == two and one["align"] != 0
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_losses_on_a_subset_are_means_over_that_subset():
    sit, (x, _, y, _) = trained_looking(tiny()).train(), batch()
    z, keep = torch.randn(3, 17, 16), subset(3, 16, 0.25)
    found = drawn(drop=torch.tensor([0.0, 0.5, 0.5]), scores=scores_of(keep, 16))
    t, noise, cls_noise = found["t"], found["noise"], found["cls_noise"]
    losses = training_losses(sit, x, y, z, CONFIG, given(found))
    labels = torch.tensor([10, y[1], y[2]])
    x_t = add_noise(x, noise, t.view(3, 1, 1, 1))
    out = sit(x_t, t, labels, add_noise(z[:, 0], cls_noise, t[:, None]), keep)
    v, error, cosines = patchify(noise - x, 2), [], []
    for i in range(3):
        error += [((out.v[i, j] - v[i, k]) ** 2).mean() for j, k in enumerate(keep[i])]
        pairs = zip(out.z_pred[i], torch.cat([z[i, :1], z[i, 1 + keep[i]]]), strict=True)
        cosines += [a @ b / a.norm() / b.norm() for a, b in pairs]
    torch.testing.assert_close(losses["denoise"], torch.stack(error).mean())
    torch.testing.assert_close(losses["cls"], (out.v_cls - (cls_noise - z[:, 0])).square().mean())
    torch.testing.assert_close(losses["align"], -torch.stack(cosines).mean())
    assert len(cosines) == 3 * 13
    torch.testing.assert_close(
        losses["loss"], losses["denoise"] + 0.03 * losses["cls"] + 0.5 * losses["align"]
    )


@pytest.mark.parametrize(
    "method, parts",
    [("sit", {"denoise"}), ("repa", {"denoise", "align"}), ("reg", {"denoise", "align", "cls"})],
)
def test_each_method_has_its_own_terms(method, parts):
    config, sit = make_config(**SIZE, method=method), trained_looking(tiny(method=method)).train()
    x, _, y, _ = batch()
    z = None if method == "sit" else torch.randn(3, 17, 16)
    losses = training_losses(sit, x, y, z, config, StepRng(config, step=0))
    assert {name for name, value in losses.items() if value != 0} == parts | {"loss"}
    losses["loss"].backward()
    unused = [name for name, p in sit.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # DDP would stop at a weight without gradient


def test_losses_are_float32_where_the_network_computes_in_bfloat16():
    sit, (x, _, y, _) = trained_looking(tiny()).bfloat16().train(), batch()
    z = torch.randn(3, 17, 16)

    def half(x, t, y, cls, keep):
        return sit(x.bfloat16(), t, y, cls.bfloat16(), keep)

    losses = training_losses(half, x, y, z, CONFIG, given(drawn()))
    assert half(x, torch.rand(3), y, z[:, 0], None).v.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in losses.values())


class Spy:
    """Keeps what the network is shown and predicts zeros for 12 patches."""

    def __init__(self):
        self.seen = []

    def __call__(self, x_t, t, y, cls_t, ids_keep):
        self.seen.append(dict(x_t=x_t, t=t, y=y, cls_t=cls_t, ids_keep=ids_keep))
        n, num_kept = len(x_t), 16 if ids_keep is None else ids_keep.shape[1]
        return SiTOutput(torch.zeros(n, num_kept, 16), torch.zeros(n, 16), None)


def test_labels_are_dropped_at_the_stated_rate_and_times_are_uniform():
    x, y, spy = torch.zeros(20000, 4, 8, 8), torch.zeros(20000, dtype=torch.long), Spy()
    training_losses(spy, x, y, torch.zeros(20000, 17, 16), UNMASKED, StepRng(CONFIG, step=1))
    t, y = spy.seen[0]["t"], spy.seen[0]["y"]
    assert set(y.tolist()) == {0, 10}
    assert (y == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert t.min() >= 0 and t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert t.var().item() == pytest.approx(1 / 12, abs=0.003)
    assert torch.corrcoef(torch.stack([t, (y == 10).float()]))[0, 1].abs() < 0.03


def test_dropped_labels_become_the_null_class_and_the_others_stay():
    (x, _, y, _), spy = batch(), Spy()
    found = drawn(drop=torch.tensor([0.05, 0.1, 0.0]))  # below label_dropout, 0.1, is dropped
    training_losses(spy, x, y, torch.randn(3, 17, 16), CONFIG, given(found))
    assert spy.seen[0]["y"].tolist() == [10, y[1].item(), 10]


def test_the_class_token_has_the_time_of_the_image_and_noise_of_its_own():
    (x, _, y, _), z, found, spy = batch(), torch.randn(3, 17, 16), drawn(), Spy()
    training_losses(spy, x, y, z, CONFIG, given(found))
    t = found["t"][:, None]
    torch.testing.assert_close(spy.seen[0]["cls_t"], (1 - t) * z[:, 0] + t * found["cls_noise"])


def test_the_rows_of_all_parts_are_those_of_the_whole_batch():
    """So two processes see the noise, times, masks and dropped labels of one."""
    whole = StepRng(CONFIG, step=3)
    parts = [StepRng(CONFIG, step=3, part=part, parts=3) for part in range(3)]
    for draw, shape in (("rand", ()), ("rand", (16,)), ("randn", (4, 8, 8)), ("randn", (5,))):
        rows = [getattr(rng, draw)(2, *shape) for rng in parts]
        assert torch.equal(torch.cat(rows), getattr(whole, draw)(6, *shape))


def test_a_step_has_random_numbers_that_depend_on_seed_and_step_alone():
    torch.manual_seed(0)
    one = StepRng(CONFIG, step=3)
    torch.manual_seed(1)
    two, other_step = StepRng(CONFIG, step=3), StepRng(CONFIG, step=4)
    other_seed = StepRng(make_config(**SIZE, seed=1), step=3)
    rows = [rng.randn(100) for rng in (one, two, other_step, other_seed)]
    assert one.step == 3 and torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], one.randn(100))  # asked twice, it goes on


def test_an_unmasked_method_shows_the_network_every_patch():
    (x, _, y, _), spy = batch(), Spy()
    training_losses(spy, x, y, torch.randn(3, 17, 16), UNMASKED, StepRng(CONFIG, step=0))
    assert spy.seen[0]["ids_keep"] is None
    training_losses(spy, x, y, torch.randn(3, 17, 16), CONFIG, StepRng(CONFIG, step=0))
    assert spy.seen[1]["ids_keep"].shape == (3, 12)


def test_network_and_losses_are_one_graph():
    """Nothing in them makes torch.compile stop and let Python continue."""
    sit = trained_looking(tiny(mixer_depth=1, depth=1, align_depth=1)).train()
    x, _, y, _ = batch()
    z = torch.randn(3, 17, 16)
    torch.compiler.reset()
    losses = torch.compile(training_losses, backend="eager", fullgraph=True)
    terms = losses(sit, x, y, z, CONFIG, given(drawn()))
    terms["loss"].backward()
    torch.testing.assert_close(terms, training_losses(sit, x, y, z, CONFIG, given(drawn())))
