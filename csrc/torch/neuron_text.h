// A neuron as one string, such as "li decay=0.25": an argument that explains itself, as each one costs a call some
// tenth of a microsecond. Its keys are the fields that the neuron's options declare, in their order;
// stbp_cuda/neurons.py writes it.
#pragma once

#include <charconv>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <unordered_map>
#include <variant>

#include "../neurons/registry.h"
#include "checks.h"

namespace stbp {

template <template <class> class... Surrogate>
int surrogate_place(SurrogateList<Surrogate...>, std::string_view name) {
  int place = 0;
  int found = -1;
  ((found = name == Surrogate<double>::kName ? place : found, ++place), ...);
  if (found < 0) {
    std::ostringstream known;
    ((known << ' ' << Surrogate<double>::kName), ...);
    check(false, "surrogate must be one of", known.str(), ", got ", name);
  }
  return found;
}

// Reads the fields of options from text, one after the other.
class TextReader {
 public:
  explicit TextReader(const std::string& text) : text_(text), rest_(text) {}

  void take(std::string_view word) {
    check(rest_.substr(0, word.size()) == word, "neuron must go on with '", word, "' at '", rest_, "', got ", text_);
    rest_.remove_prefix(word.size());
  }
  void end() const { check(rest_.empty(), "neuron has more than it should, got ", text_); }

  void number(const char* key, double& value) {
    const std::string_view word = word_after(key);
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
    check(error == std::errc() && end == word.data() + word.size(), "neuron must have a number after '", key,
          "=', got ", text_);
  }
  void positive(const char* key, double& value) {
    number(key, value);
    check(value > 0, key, " must be positive, got ", value);
  }
  void flag(const char* key, bool& value) { choice(key, value, "0", "1"); }
  void choice(const char* key, bool& second, std::string_view first_name, std::string_view second_name) {
    const std::string_view word = word_after(key);
    second = word == second_name;
    check(second || word == first_name, key, " must be ", first_name, " or ", second_name, ", got ", word);
  }
  void surrogate(const char* key, int& place) { place = surrogate_place(Surrogates{}, word_after(key)); }

 private:
  std::string_view word_after(const char* key) {
    take(std::string(" ") + key + "=");
    const std::string_view found = rest_.substr(0, rest_.find(' '));
    rest_.remove_prefix(found.size());
    return found;
  }

  const std::string& text_;
  std::string_view rest_;
};

// Reads the numbers among the fields from an array, and leaves the others.
class NumberReader {
 public:
  NumberReader(const double* values, int64_t count) : values_(values), count_(count) {}

  void number(const char*, double& value) {
    check(read_ < count_, "numbers has too few values, ", count_);
    value = values_[read_++];
  }
  void positive(const char* key, double& value) {
    number(key, value);
    check(value > 0, key, " must be positive, got ", value);
  }
  void flag(const char*, bool&) {}
  void choice(const char*, bool&, std::string_view, std::string_view) {}
  void surrogate(const char*, int&) {}
  void end() const { check(read_ == count_, "numbers has too many values, ", count_); }

 private:
  const double* values_;
  int64_t count_, read_ = 0;
};

template <class... Options>
NeuronOptions parse_neuron(std::variant<Options...>, const std::string& text) {
  const std::string name = text.substr(0, text.find(' '));
  NeuronOptions parsed;
  const auto parse = [&](auto options) {
    if (name != options.kName) return false;
    TextReader reader(text);
    reader.take(name);
    options.read(reader);
    reader.end();
    parsed = options;
    return true;
  };
  if (!(parse(Options()) || ...)) {
    std::ostringstream known;
    ((known << ' ' << Options::kName), ...);
    check(false, "neuron must begin with one of", known.str(), ", got '", text, "'");
  }
  return parsed;
}

// The options of a neuron. `numbers` are those among its fields, a tensor in float64 on the CPU: where it is given,
// they hold in place of those in the text, so that a compiled graph is right for all values. `last` is one more.
inline NeuronOptions neuron_options(const std::string& neuron, const std::optional<Tensor>& numbers, const Tensor& x,
                                    double* last = nullptr) {
  static thread_local std::unordered_map<std::string, NeuronOptions> known;
  auto found = known.find(neuron);
  if (found == known.end()) {
    if (known.size() >= 1000) known.clear();  // someone changes the width in every step
    found = known.emplace(neuron, parse_neuron(NeuronOptions(), neuron)).first;
  }
  NeuronOptions options = found->second;
  if (numbers) {
    check(numbers->is_cpu() && numbers->scalar_type() == ScalarType::Double && numbers->dim() == 1 &&
              has_strides(*numbers, {1}),
          "numbers must be a contiguous tensor of one dimension in float64 on the CPU");
    NumberReader reader(static_cast<const double*>(numbers->const_data_ptr()), numbers->numel());
    std::visit([&](auto& of) { of.read(reader); }, options);
    if (last) reader.number("", *last);
    reader.end();
  }
  check(x.scalar_type() == ScalarType::Double || !std::visit([](const auto& of) { return of.is_smooth(); }, options),
        "the smooth spike needs x in float64");
  return options;
}

inline LifOptions lif_options(const std::string& neuron, const std::optional<Tensor>& numbers, const Tensor& x,
                              double& norm_decay) {
  const NeuronOptions options = neuron_options(neuron, numbers, x, &norm_decay);
  const auto* lif = std::get_if<LifOptions>(&options);
  check(lif != nullptr, "normalisation is there for neurons of the kind lif, got ", neuron);
  check(lif->is_plain(), "normalisation is there for plain LIF neurons only, got ", neuron);
  return *lif;
}

}  // namespace stbp
