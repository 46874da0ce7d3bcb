"""What do all trainings share? Loop, optimizer, memory, corpora, a small world, exams, reports."""
