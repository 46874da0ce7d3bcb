"""What do all trainings share? The loop, the optimizer, memory, corpora, the small world, exams, reports."""
