import os

# Before jax is first imported: pmap and shard_map are tested on virtual devices.
FLAG = "--xla_force_host_platform_device_count"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The commands keep what they compile in the user's cache; tests leave it alone.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
