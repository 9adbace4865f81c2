// Which of the mutants in tests/test_mutants.py runs. Every mutant is compiled into one program, and the environment
// chooses.
#pragma once

#include <cstdlib>

inline int chosen_mutant() {
  const char* const number = std::getenv("STBP_MUTANT");
  return number ? std::atoi(number) : -1;
}

inline bool mutant(int number) {
  static const int chosen = chosen_mutant();
  return number == chosen;
}
