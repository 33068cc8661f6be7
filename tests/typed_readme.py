import jax, jax.numpy as jnp, nadaptor

w1, w2 = (jax.random.normal(key, (8, 8)) for key in jax.random.split(jax.random.key(0)))
f = lambda x: nadaptor.lsq(x @ w1, 0.5, levels=2) @ w2    # a quantized network: any JAX function
x = jax.random.normal(jax.random.key(1), (4, 8))
net = nadaptor.spiking(f, x)                              # f with neurons: prepare, init, step
sim = nadaptor.simulate(f, x, num_steps=64)               # the scan over time
sim.outputs          # [64, 4, 8]: at index t - 1, the mean output of the first t steps
sim.spike_counts     # one array for each layer of neurons: ([4, 8],)
