"""Linen modules against the NNX classes that they are made from."""

import functools
import inspect

import jax
import jax.numpy as jnp
import laws_subjects  # registers the subjects
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import InvalidRngError, ModifyScopeVariableError
from toy import ToyBlock

from triform import arch
from triform.arch import Block, Retention, RetNet, SequenceModule, linen
from triform.arch.layers.feed_forward import GatedFeedForward
from triform.arch.layout import split_model
from triform.arch.models.classifier import TokenEmbedding

B, T, D = 2, 7, 8
DTYPES = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def first_of_each_class():
  """Subjects of the laws that are a class and its options; of models, one is not slow."""
  subjects = {}
  for subject in laws_subjects.SUBJECTS.values():
    if isinstance(subject.make, functools.partial) and inspect.isclass(subject.make.func):
      subjects.setdefault(subject.make.func, subject)
  for nnx_class, subject in subjects.items():
    slow = nnx_class.__module__.startswith("triform.arch.models.") and nnx_class is not RetNet
    yield pytest.param(subject, id=subject.name, marks=pytest.mark.slow if slow else ())


def twins(make):
  """The NNX module that `make` makes, its Linen module, and the variables of both."""
  nnx_class = make.func
  facade = getattr(linen, nnx_class.__name__, None) or linen.linen_class(nnx_class)
  options = {f"{n}_" if hasattr(nn.Module, n) else n: v for n, v in make.keywords.items()}
  model = make(**DTYPES, rngs=nnx.Rngs(0))
  return model, facade(*make.args, **options, **DTYPES), linen.to_variables(model)


def assert_same(one, other):
  one, other = jax.tree.leaves(one), jax.tree.leaves(other)
  assert len(one) == len(other) > 0
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("subject", list(first_of_each_class()))
def test_weights_of_nnx_give_the_same(subject):
  """Bit for bit, in training: outputs, state, gradients and batch statistics."""
  model, module, variables = twins(subject.make)
  x = subject.inputs(np.random.default_rng(0), B, T)
  x = jnp.asarray(x, jnp.float32 if x.dtype.kind == "f" else jnp.int32)
  key = jax.random.key(3)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
    jnp.shape, jax.eval_shape(functools.partial(module.init, train=True), key, x)
  )
  call = {"mask": jnp.ones((B, T), bool).at[0, 2].set(False)}
  if model.causal:
    call |= {"reset": jnp.zeros((B, T), bool).at[1, 3].set(True)}
    state = jax.tree.map(lambda a: a + jnp.ones_like(a), module.init_state(B))
    assert jax.tree.structure(state) == jax.tree.structure(model.init_state(B))
    if not model.state_is_constant:  # of a cache, rows and count belong together
      state = module.init_state(B)
  else:
    state = ()
  dropout = module.bind({}, rngs={"dropout": key}).make_rng("dropout")
  graphdef, params, statistics = split_model(model)

  def of_nnx(params):
    module = nnx.merge(graphdef, params, statistics)
    y, after = module(x, state, form="chunkwise", **call, rngs=nnx.Rngs(dropout=dropout))
    return jnp.sin(y).sum(), (y, after, nnx.state(module, nnx.BatchStat))

  def of_linen(params):
    (y, after), changed = module.apply(
      {**variables, "params": params}, x, state, form="chunkwise", **call, train=True,
      rngs={"dropout": key}, mutable=["batch_stats"],
    )  # fmt: skip
    return jnp.sin(y).sum(), (y, after, changed)

  expected = jax.jit(jax.grad(of_nnx, has_aux=True))(params)
  found = jax.jit(jax.grad(of_linen, has_aux=True))(variables["params"])
  assert_same(found, expected)
  again = module.to_nnx(variables)
  assert nnx.graphdef(again) == graphdef
  assert_same(nnx.state(again), nnx.state(model))


def test_every_class_has_a_linen_module():
  classes = {
    name for name, value in vars(arch).items()
    if inspect.isclass(value) and issubclass(value, SequenceModule)
  } - {"SequenceModule"}  # fmt: skip
  assert classes <= set(linen.__all__)
  for name in classes:
    module, nnx_class = getattr(linen, name), getattr(arch, name)
    assert module.__name__ == name and nnx_class.__doc__.splitlines()[0] in module.__doc__
    for method in ("__call__", "init_state"):
      parameters = inspect.signature(getattr(nnx_class, method)).parameters
      expected = ["train" if n == "rngs" else n for n in parameters]
      assert list(inspect.signature(getattr(module, method)).parameters) == expected


def test_attributes_are_the_arguments():
  module = linen.Retention(D, num_heads=2, decay="gated")
  assert "num_heads = 2" in repr(module) and "decay = 'gated'" in repr(module)
  assert module.clone(num_heads=4).num_heads == 4
  assert module == linen.Retention(d_model=D, num_heads=2, decay="gated")
  assert module.causal and module.state_is_constant
  with pytest.raises(TypeError, match="num_heads"):
    linen.Retention(D)
  with pytest.raises(ValueError, match="key_dim 8 is not divisible by num_heads 3"):
    linen.Retention(num_heads=3).init(jax.random.key(0), jnp.ones((B, T, D)))


def test_width_is_that_of_the_input():
  x = jnp.ones((B, T, D))
  implicit, explicit = linen.Retention(num_heads=2), linen.Retention(D, num_heads=2)
  variables = implicit.init(jax.random.key(0), x)
  assert_same(variables, explicit.init(jax.random.key(0), x))
  assert_same(implicit.apply(variables, x), explicit.apply(variables, x))
  with pytest.raises(ValueError, match="d_model is None"):
    implicit.init_state(B)


def test_bad_calls_are_refused():
  x = jnp.ones((B, T, D))
  module = linen.Retention(num_heads=2)
  variables = module.init(jax.random.key(0), x)
  with pytest.raises(TypeError, match="train=True"):
    module.bind(variables)(x, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match="forms"):
    module.apply(variables, x, forms="parallel")
  with pytest.raises(InvalidRngError, match="dropout"):
    module.apply(variables, x, train=True)
  params = variables["params"]
  with pytest.raises(ValueError, match="params lacks gate, key"):
    module.apply({}, x)
  with pytest.raises(ValueError, match="params has unknown extra"):
    module.apply({"params": {**params, "extra": x}}, x)
  with pytest.raises(ValueError, match=r"params/key/kernel has shape \(2,\), expected \(8, 8\)"):
    module.apply({"params": {**params, "key": {"kernel": jnp.ones(2)}}}, x)
  with pytest.raises(ValueError, match="params/key is an array, expected kernel"):
    module.apply({"params": {**params, "key": x}}, x)


def test_batch_statistics_change_in_training_alone():
  module = linen.linen_class(ToyBlock)(**DTYPES)
  x = 5 + jax.random.normal(jax.random.key(0), (B, T, D))
  rngs = {"dropout": jax.random.key(2)}
  variables = module.init({"params": jax.random.key(1), **rngs}, x, train=True)
  statistics = variables["batch_stats"]["norm"]
  assert_same(statistics, {"mean": jnp.zeros(D), "var": jnp.ones(D)})
  (y, _), changed = module.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
  np.testing.assert_allclose(changed["batch_stats"]["norm"]["mean"], 0.1 * x.mean((0, 1)), 1e-5)
  (other, _), same = module.apply(variables, x, mutable=["batch_stats"])
  assert_same(same["batch_stats"], variables["batch_stats"])
  assert jnp.any(y != other)
  with pytest.raises(ModifyScopeVariableError):
    module.apply(variables, x, train=True, rngs=rngs)


OPTIONS = {
  "vocab_size": 11, "d_model": 8, "num_layers": 2, "num_heads": 2, "value_dim": 8, "ffn_dim": 8,
}  # fmt: skip


def test_model_has_the_methods_of_nnx():
  module = linen.RetNet(**OPTIONS, scan_layers=False)
  ids = jnp.arange(10).reshape(2, 5)
  variables = jax.jit(module.init)(jax.random.key(0), ids)

  @jax.jit
  def in_pieces(variables, ids):
    bound = module.bind(variables)
    features, state = bound.encode(ids[:, :3], module.init_state(2))
    rest, _ = module.apply(variables, ids[:, 3:], state, form="recurrent", method="encode")
    features = jnp.concatenate([features, rest], axis=1)
    return module.apply(variables, features, method=module.read_out)

  whole, _ = jax.jit(module.apply)(variables, ids)
  np.testing.assert_allclose(in_pieces(variables, ids), whole, atol=1e-5)
  # NNX has numbers for the names of layers.
  pure = nnx.to_pure_dict(nnx.state(module.to_nnx(variables), nnx.Param))
  assert 1 in pure["stack"]["layers"] and "1" in variables["params"]["stack"]["layers"]
  assert_same(jax.jit(module.apply)({"params": pure}, ids)[0], whole)


def test_modules_are_given_as_what_makes_them():
  norm = functools.partial(nnx.RMSNorm, D)
  parts = {
    "mixer_norm": norm,
    "mixer": functools.partial(Retention, D, num_heads=2),
    "feed_forward_norm": norm,
    "feed_forward": functools.partial(GatedFeedForward, D, 12),
  }
  module = linen.Block(**parts, dropout=0.1)
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  variables = module.init(jax.random.key(1), x)
  rngs = nnx.Rngs(0)
  block = Block(**{name: make(rngs=rngs) for name, make in parts.items()}, dropout=0.1)
  nnx.update(block, variables["params"])
  assert_same(module.apply(variables, x), block(x))
  wrong = module.clone(mixer=linen.Retention(num_heads=2))
  with pytest.raises(ValueError, match="mixer is a Retention, expected what makes an NNX module"):
    wrong.init(jax.random.key(1), x)


def test_lifted_transformations():
  """Scanned and rematerialised layers with states and dropout; replicas side by side."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, state):
      y, state = linen.linen_class(ToyBlock)(**DTYPES, name="toy")(x, state, train=True)
      return x + y, state

  n, keys = 3, {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  x = jax.random.normal(jax.random.key(2), (B, T, D))
  axes = {"params": 0, "batch_stats": 0}
  split = {"params": True, "dropout": True}
  one = linen.linen_class(ToyBlock)(D, **DTYPES).init_state(B)
  states = jax.tree.map(lambda a: jnp.stack([a] * n), one)
  scanned = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs=split, length=n)()
  variables = scanned.init(keys, x, states)
  kernel = variables["params"]["toy"]["mixer"]["query"]["kernel"]
  assert kernel.shape == (n, D, D) and jnp.any(kernel[0] != kernel[1])
  (y, after), changed = scanned.apply(variables, x, states, rngs=keys, mutable=["batch_stats"])
  assert y.shape == x.shape and jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, states)
  means = changed["batch_stats"]["toy"]["norm"]["mean"]
  assert means.shape == (n, D) and jnp.all(means[0] != means[1])

  replicas = nn.vmap(linen.Retention, variable_axes={"params": 0}, split_rngs={"params": True})
  replicas = replicas(num_heads=2)
  variables = replicas.init(jax.random.key(0), x[None].repeat(2, axis=0))
  y, _ = replicas.apply(variables, x[None].repeat(2, axis=0))
  for i in range(2):
    alone, _ = linen.Retention(num_heads=2).apply(jax.tree.map(lambda a, i=i: a[i], variables), x)
    np.testing.assert_allclose(y[i], alone, atol=1e-6)


def test_a_shared_module_is_made_once():
  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      mixer = linen.Retention(num_heads=2)
      return mixer(mixer(x)[0])[0]

  x = jnp.ones((B, T, D))
  variables = Twice().init(jax.random.key(0), x)
  assert list(variables["params"]) == ["Retention_0"]
  retention, inner = linen.Retention(D, num_heads=2), {"params": variables["params"]["Retention_0"]}
  once, _ = retention.apply(inner, x)
  assert_same(Twice().apply(variables, x), retention.apply(inner, once)[0])


class Odd(SequenceModule):
  """Has an argument that Linen's modules have a method for, and a variable of a kind of its own."""

  def __init__(self, *, init: float, rngs):
    self.scale = nnx.Param(jnp.asarray(init))
    if init < 0:
      self.rngs = rngs

  def __call__(self, x, state=None, *, form="parallel", reset=None, mask=None, rngs=None):
    return self.scale * x, ()


def test_names_that_linen_uses_and_variables_it_lacks():
  module = linen.linen_class(Odd)(init_=2.0)
  x = jnp.ones((B, T, D))
  assert_same(module.apply(module.init(jax.random.key(0), x), x), (2 * x, ()))
  with pytest.raises(ValueError, match="Odd holds RngCount, RngKey, expected "):
    module.clone(init_=-1.0).init(jax.random.key(0), x)


@pytest.mark.parametrize("name", ["CausalHyperMixing", "HyperMixing"])
def test_hypermixing(name):
  module = getattr(linen, name)(num_heads=2, mixing_dim=12)
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  variables = module.init(jax.random.key(1), x)
  y, state = module.apply(variables, x)
  expected, after = getattr(arch, name)(D, num_heads=2, mixing_dim=12, rngs=nnx.Rngs(0))(x)
  assert jax.tree.map(jnp.shape, (y, state)) == jax.tree.map(jnp.shape, (expected, after))


def test_both_passes_of_hypermixing():
  """Methods beside the call, of a module whose state is empty."""
  module = linen.HyperMixing(num_heads=2, mixing_dim=12)
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  variables = module.init(jax.random.key(1), x)
  y, state = module.apply(variables, x)
  assert state == ()
  total = module.apply(variables, x, method="accumulate")
  np.testing.assert_allclose(module.apply(variables, total, x, method="read_out"), y, rtol=1e-5)


@pytest.mark.parametrize("name", ["Classifier", "Stack"])
def test_what_makes_blocks_is_no_module(name):
  def make_block(rngs):
    return arch.HyperMixing(D, num_heads=2, mixing_dim=12, rngs=rngs)

  stack = {"make_block": make_block, "num_layers": 2, "scan": True}
  parts = {
    "stem": functools.partial(TokenEmbedding, 9, D, scale=1.0, **DTYPES),
    "stack": functools.partial(arch.Stack, **stack),
    "norm": functools.partial(nnx.LayerNorm, D),
  }
  options = {"Stack": stack, "Classifier": {**parts, "d_model": D, "num_classes": 2}}
  module = getattr(linen, name)(**options[name])
  x = jnp.ones((B, T, D)) if name == "Stack" else jnp.ones((B, T), int)
  y, _ = module.apply(module.init(jax.random.key(0), x), x)
  assert y.shape == (x.shape if name == "Stack" else (B, 2))
