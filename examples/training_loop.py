"""A training loop of one's own: a plain JAX network, optax, `quantize`, and the spiking network.

The network with ReLUs is trained first, then quantized and trained on with the noise of the
adaptor, its scales beside its weights. Nothing of nadaptor's own training is used. It takes
seconds; the data are the 8x8 digits of scikit-learn.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import nadaptor
from nadaptor.quantization import project_scales

BATCH = 64
Loss = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def init(key: jax.Array) -> list[jax.Array]:
    """Returns the weights of a perceptron with two hidden layers."""
    sizes = (64, 64, 64, 10)
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes, sizes[1:], strict=False)
    return [jax.random.normal(k, (m, n)) * (2 / m) ** 0.5 for k, m, n in pairs]


def network(params: list[jax.Array], images: jax.Array) -> jax.Array:
    """Maps images [B, 64] to logits [B, 10]; knows nothing of quantizers or neurons."""
    x = images
    for weights in params[:-1]:
        x = jax.nn.relu(x @ weights)
    return x @ params[-1]


quantized = nadaptor.quantize(network, levels=2)


def relu_loss(trained: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """The loss of the network with ReLUs; it has no use for the key."""
    logits = network(trained["params"], images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def noisy_loss(trained: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """The loss of the quantized network with noise; the key turns it on."""
    logits = quantized(trained["scales"], trained["params"], images, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(loss: Loss, trained: Any, data: Any, num_steps: int, rate: float, key: jax.Array) -> Any:
    """Trains with Adam on random batches, and keeps scales positive after each update."""
    images, labels = data
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    @jax.jit
    def step(trained: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        choice, noise = jax.random.split(key)
        batch = jax.random.choice(choice, len(images), (BATCH,), replace=False)
        gradient = jax.grad(loss)(trained, images[batch], labels[batch], noise)
        updates, state = optimizer.update(gradient, state)
        trained = optax.apply_updates(trained, updates)
        return {**trained, "scales": project_scales(trained["scales"])}, state

    state = optimizer.init(trained)
    for step_key in jax.random.split(key, num_steps):
        trained, state = step(trained, state, step_key)
    return trained


def accuracy_over_time(trained: Any, data: Any, num_steps: int) -> jax.Array:
    """Returns the spiking network's accuracy at t = 1 to T, [T]."""
    images, labels = data
    simulate = jax.jit(lambda s, p, x: nadaptor.simulate(quantized, s, p, x, num_steps=num_steps))
    outputs = simulate(trained["scales"], trained["params"], images).outputs
    return (outputs.argmax(-1) == labels).mean(-1)


def main(num_steps: int = 600) -> jax.Array:
    """Trains, converts, and prints the accuracy on images kept apart."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    data, kept = (images[:1347], labels[:1347]), (images[1347:], labels[1347:])
    start, first, second = jax.random.split(jax.random.key(0), 3)

    trained = {"params": init(start), "scales": {}}
    trained = train(relu_loss, trained, data, num_steps, 3e-3, first)
    trained["scales"] = quantized.init(trained["params"], images[:256])
    trained = train(noisy_loss, trained, data, num_steps, 1e-3, second)

    accuracy = accuracy_over_time(trained, kept, 16)
    for t in (1, 2, 4, 8, 16):
        print(f"T = {t:2}: {100 * accuracy[t - 1]:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
