"""How is a batch computed? Scheduler, block pool, runner, sampler, grammar, ranks and C++."""
