"""How is a batch computed? Scheduler and block pool, runner, sampler, grammar, several ranks, C++."""
