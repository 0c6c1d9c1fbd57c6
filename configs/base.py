"""Every field of a run, with its unit and reason. Other configs import this one and change it.

A small complete Lightning model on the Python standard library's own text; it trains, but
`configs/quickstart.py` and `configs/small.py` are the ones to run.

    python -m experiments.train --config=configs/base.py --workdir=runs/base
"""

from ml_collections import ConfigDict


def named(**fields) -> ConfigDict:
    """A ConfigDict that keeps the order in which its keys are written: stages are a sequence."""
    return ConfigDict(fields, sort_keys=False)


def stage(**changes) -> ConfigDict:
    """One stage of pretraining: the defaults below, then `changes`."""
    fields = dict(
        tokens=1_000_000,  # tokens of the stage; rounded up to whole optimizer steps
        mixture=named(),  # weights of the sources it takes; empty: all, each by its own weight
        batch_size=8,  # sequences per optimizer step, over all devices
        seq_len=512,  # tokens per sequence
        accumulate=1,  # micro-batches per optimizer step: memory falls, results do not change
        learning_rate=3e-3,  # peak
        final_learning_rate=0.0,  # at the end of the decay
        warmup_tokens=0,  # tokens of linear warm-up, from the previous stage's last rate
        decay="none",  # none, linear, cosine or sqrt (1 - sqrt), over the last decay_tokens
        decay_tokens=0,  # tokens of decay at the end of the stage
        rope_base_global=0.0,  # RoPE base of global layers in this stage; 0: that of the model
    )
    unknown = set(changes) - set(fields)
    if unknown:
        raise KeyError(f"unknown stage field {sorted(unknown)}: one of {sorted(fields)}")
    return named(**{**fields, **changes})


def source(path: str, eval_path: str = "", weight: float = 1.0) -> ConfigDict:
    """One domain of text; without `eval_path` a part of `path` is held out.

    Of the tokens of a stage without a mixture, it gets `weight` over the sum of all weights.
    """
    return named(
        path=path,  # a file, folder or glob (`**` recurses), stdlib:code, stdlib:docs, recall:TASK
        eval_path=eval_path,  # the same, held out whole; "": a part of `path`, see eval_fraction
        weight=weight,  # its share, over the sum of all, of stages without a mixture
    )


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation and data order

    model = config.model = ConfigDict()
    model.vocab_size = 0  # rows of the embedding; 0: the tokenizer's, rounded up to 16
    model.model_dim = 128  # D, residual stream
    model.prefix = ""  # layers before the units, with a dense MLP; letters as in `unit`
    model.unit = "LLLGLLLg"  # one letter per layer: L local, G global; lower case borrows K/V
    model.unit_mlp = ""  # one letter per layer of the unit: E experts, D dense; "": all E
    model.num_units = 1  # repeats of the unit; the scan runs over them
    model.mlp_dim = 384  # F of dense MLPs (prefix layers, and all layers if num_experts = 0)
    model.norm_eps = 1e-5  # RMSNorm
    model.tie_embeddings = True  # the head is the embedding, transposed
    model.compute_dtype = "float32"  # float32 or bfloat16; parameters are always float32
    model.scan = True  # scan over units: compile time does not grow with depth; False unrolls
    model.remat = "none"  # layer by layer: none, full, or a name in jax.checkpoint_policies
    model.head_chunk = 2048  # tokens of a device whose logits the loss holds at one time

    attention = model.attention = ConfigDict()
    attention.num_heads = 4  # N query heads
    attention.num_kv_heads = 2  # K key/value heads, a divisor of N
    attention.head_dim = 32  # H
    attention.window = 64  # keys a local layer sees, self included
    attention.rope_base_local = 10_000.0  # fixed when the context grows
    attention.rope_base_global = 10_000.0  # raised for long context, here or by a stage
    attention.global_rope = True  # False: no position on global layers (NoPE)
    attention.qk_norm = "head"  # RMSNorm of queries and keys: none, head, or whole projection
    attention.qkv_bias = False  # of the query, key and value projections
    attention.out_bias = False  # of the output projection
    scaling = attention.rope_scaling = ConfigDict()
    scaling.kind = "none"  # none, linear, llama3 or yarn: longer wavelengths on all rotated layers
    scaling.factor = 1.0  # new length over original length
    scaling.original_length = 4096  # tokens per sequence when the wavelengths were learned
    scaling.low_freq_factor = 1.0  # llama3: wavelengths above original / this are stretched fully
    scaling.high_freq_factor = 4.0  # llama3: wavelengths below original / this are kept
    scaling.beta_fast = 32.0  # yarn: pairs with more turns than this in the original are kept
    scaling.beta_slow = 1.0  # yarn: pairs with fewer turns than this are stretched fully
    scaling.truncate = True  # yarn: whole pairs as bounds of the ramp between them
    scaling.attention_factor = 1.0  # yarn: factor of queries and keys
    attention.output_gate = False  # one sigmoid gate per head on the attention output
    attention.sinks = False  # one learned logit per head that takes attention from all keys
    attention.implementation = ""  # a name in ops/attention.py; "": chosen by device and shape

    moe = model.moe = ConfigDict()
    moe.num_experts = 16  # E routed experts per layer; 0: dense MLPs
    moe.expert_dim = 96  # F of one expert, routed or shared
    moe.num_shared_experts = 1  # experts that every token uses
    moe.train_routing = "top_p"  # top_k, top_p, or dense (every expert)
    moe.eval_routing = "top_p"  # routing of evaluation and generation
    moe.router_score = "softmax"  # softmax over experts, or sigmoid of each logit
    moe.top_k = 4  # experts per token under top_k
    moe.top_p = 0.4  # probability mass to reach under top_p, of a new router: then it has its own
    moe.max_experts = 8  # static bound on experts per token under top_p
    moe.renormalize_gates = False  # gates sum to 1 over the chosen; False: raw probabilities
    moe.routed_scale = 1.0  # factor on the routed experts' sum
    moe.router_bias = False  # learned bias of the router logits (bias_update_rate has its own)
    moe.expert_bias = False  # of the three projections of every routed expert
    moe.clamp = 0.0  # bound of the clamped gated unit (gpt-oss) in experts; 0: SwiGLU
    moe.target_experts = 3.0  # mean experts per token that the controller holds; 0: top_p is fixed
    moe.controller_kp = 0.0  # proportional gain, on the change of log(target / mean)
    moe.controller_ki = 0.5  # integral gain on log(target / mean), per step of logit(top_p)
    moe.bias_update_rate = 1e-3  # aux-free balancing: step of the selection bias; 0: off
    moe.num_groups = 4  # expert-parallel groups of the balance losses, virtual on one device
    moe.num_partitions = 2  # partitions per group of the PEP loss
    moe.switch_weight = 1e-6  # balance over single experts (Switch)
    moe.group_weight = 1e-4  # EP balance: experts within each group
    moe.partition_weight = 1e-3  # PEP balance: experts within each partition of a group
    moe.true_group_weight = 0.0  # balance between groups, blind to imbalance inside a group
    moe.z_weight = 1e-4  # squared log-sum-exp of router logits
    moe.entropy_weight = 1e-4  # router entropy: keeps top_p from needing more and more experts
    moe.max_groups = 0  # groups that a token's experts may come from: bounds its peers; 0: all
    moe.capacity_factor = 0.0  # of all slots over E: what an expert takes of a row; 0: dropless
    # onehot, blocked, ragged_dot, pallas_tpu or pallas_gpu; "": chosen by device.
    moe.implementation = ""
    # Where mesh.expert > 1: how rows reach the experts of other devices.
    moe.transport = ""  # all_to_all, all_gather, ragged_all_to_all; "": chosen by number of tokens
    moe.exchange_rows = 1.0  # buffer for one device, of its equal share: memory against rounds

    optimizer = config.optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw or muon (Muon on matrices, AdamW on the rest)
    optimizer.beta1 = 0.9  # decay of the first moment, per step; under muon also its momentum
    optimizer.beta2 = 0.95  # decay of the second moment, per step
    optimizer.epsilon = 1e-8  # added to the root of the second moment
    optimizer.weight_decay = 0.1  # times the learning rate; on matrices only
    optimizer.clip_norm = 1.0  # global norm of the gradient
    optimizer.ema_decay = 0.0  # of averaged parameters, per step, less at first; 0: no average
    optimizer.z_loss_weight = 1e-4  # squared log-sum-exp of the output logits
    optimizer.on_nan = "stop"  # stop, or skip the step, when loss or gradient is not finite

    config.stages = named(
        stable=stage(tokens=800_000, warmup_tokens=80_000),
        decay=stage(tokens=200_000, decay="sqrt", decay_tokens=200_000),
    )

    data = config.data = ConfigDict()
    data.tokenizer = "bytes"  # bytes; bpe:<size>, trained on the run's text; or a file or folder
    data.sources = named(
        code=source("stdlib:code", weight=0.9),  # the installed Python's own modules
        docs=source("stdlib:docs", weight=0.1),  # their docstrings
    )
    data.text_field = "text"  # key of the text in jsonl and parquet records
    data.eval_fraction = 0.05  # of documents, by a hash of their text; of one document, its tail
    data.packing = "concat"  # concat: no padding; first_fit: documents are cut only if too long
    data.prefetch = 2  # batches made ahead in a background thread
    data.streams = 1  # parts of each source, read and packed apart, that processes share out

    mesh = config.mesh = ConfigDict()
    mesh.replica = 1  # copies of the model, one or more on each TPU slice or group of hosts
    mesh.data = -1  # parts of the batch; -1: all devices that the other axes leave
    mesh.fsdp = 1  # parts of the batch, over which parameters are stored too
    mesh.expert = 1  # parts of the experts; the batch, and other parameters, as over fsdp
    mesh.tensor = 1  # parts of heads, hidden features and vocabulary
    mesh.sequence = 1  # parts of each row of tokens, in training; 1 to generate

    config.log_every = 10  # steps between lines of metrics.jsonl and TensorBoard
    config.histogram_every = 100  # steps between TensorBoard histograms; 0: never
    config.eval_every = 200  # steps between evaluations; 0: only at the end
    config.eval_tokens = 65_536  # held-out tokens per source at each evaluation; 0: all
    config.final_eval_tokens = 1_000_000  # the same at the end, which bounds its time; 0: all
    config.checkpoint_every = 200  # steps between checkpoints
    config.keep_checkpoints = 2  # newest ones kept; the last of each stage is always kept
    config.sample_prompt = "def "  # text sample written at each evaluation
    config.sample_tokens = 128  # tokens of the sample; 0: no sample
    return config
