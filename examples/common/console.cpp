#include "examples/common/console.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <ostream>
#include <string_view>

#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

int columns_of(int file) {
  winsize size{};
  return isatty(file) != 0 && ioctl(file, TIOCGWINSZ, &size) == 0 ? size.ws_col : 0;
}

// Columns of the terminal that a person looks at, 0 if there is none. mpirun gives its ranks a
// terminal of its own without a size, wherever its output goes; then its own output counts.
int terminal_columns() {
  if (isatty(STDOUT_FILENO) == 0) return 0;
  if (const int columns = columns_of(STDOUT_FILENO)) return columns;
  std::error_code failed;
  const std::string parent = "/proc/" + std::to_string(getppid()) + "/fd/1";
  const std::string target = std::filesystem::read_symlink(parent, failed).string();
  if (failed || target.rfind("/dev/", 0) != 0) return 0;
  const int file = open(target.c_str(), O_RDONLY | O_NOCTTY | O_CLOEXEC);
  if (file < 0) return 0;
  const int columns = columns_of(file);
  close(file);
  return columns;
}

std::string padded(const std::string& text, size_t columns, bool left) {
  const auto used = static_cast<size_t>(text_columns(text));
  const std::string space(columns > used ? columns - used : 0, ' ');
  return left ? text + space : space + text;
}

/// "+-----+---+\n" over columns of these widths.
std::string frame(const std::vector<size_t>& widths) {
  std::string line;
  for (const size_t width : widths) line.append("+").append(width + 2, '-');
  return line.append("+\n");
}

}  // namespace

Progress::Progress(std::ostream& out, int columns) : out_(out), columns_(columns) {}

Progress::~Progress() {
  if (open_) out_ << '\n' << std::flush;
}

void Progress::update(const std::string& line) {
  if (columns_ == 0) {
    out_ << line << '\n' << std::flush;
    return;
  }
  // A line as wide as the terminal would wrap, and then it could not be written over.
  out_ << "\r\033[K" << cut_text(line, columns_ - 1) << std::flush;
  open_ = true;
}

void Progress::print(const std::string& line) {
  if (open_) out_ << "\r\033[K";
  open_ = false;
  out_ << line << '\n' << std::flush;
}

int progress_columns() {
  const char* term = std::getenv("TERM");
  return term != nullptr && std::string_view(term) != "dumb" ? terminal_columns() : 0;
}

std::string settings_table(const std::vector<Setting>& settings) {
  size_t name_width = 0;
  size_t value_width = 0;
  for (const Setting& setting : settings) {
    name_width = std::max(name_width, static_cast<size_t>(text_columns(setting.name)));
    value_width = std::max(value_width, static_cast<size_t>(text_columns(setting.value)));
  }
  const std::string rule = frame({name_width, value_width});
  std::string table = rule;
  for (const Setting& setting : settings) {
    table.append("| ").append(padded(setting.name, name_width, true)).append(" | ");
    table.append(padded(setting.value, value_width, true)).append(" |\n");
  }
  return table + rule;
}

std::string results_table(const std::vector<std::string>& header,
                          const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(header.size(), 0);
  const auto widen = [&widths](const std::vector<std::string>& row) {
    PERSEID_INVARIANT(row.size() == widths.size());
    for (size_t c = 0; c < row.size(); ++c) {
      widths[c] = std::max(widths[c], static_cast<size_t>(text_columns(row[c])));
    }
  };
  widen(header);
  for (const auto& row : rows) widen(row);

  const std::string rule = frame(widths);
  const auto line = [&widths](const std::vector<std::string>& row) {
    std::string text;
    for (size_t c = 0; c < row.size(); ++c) {
      text.append("| ").append(padded(row[c], widths[c], c == 0)).append(" ");
    }
    return text.append("|\n");
  };
  std::string table = rule + line(header) + rule;
  for (const auto& row : rows) table += line(row);
  return table + rule;
}

std::string load_bars(const std::vector<int64_t>& tokens_per_expert) {
  static constexpr const char* kBlocks[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  const double total = static_cast<double>(
      std::accumulate(tokens_per_expert.begin(), tokens_per_expert.end(), int64_t{0}));
  const double fair = total / static_cast<double>(std::max<size_t>(tokens_per_expert.size(), 1));
  std::string bars;
  double least = 0;
  double most = 0;
  for (size_t e = 0; e < tokens_per_expert.size(); ++e) {
    const double load = fair > 0 ? static_cast<double>(tokens_per_expert[e]) / fair : 0;
    least = e == 0 ? load : std::min(least, load);
    most = e == 0 ? load : std::max(most, load);
    // The fair share is the middle of the scale; the full block is twice of it or more.
    const double eighths = load > 0 ? std::clamp(std::round(load * 4), 1.0, 8.0) : 0;
    bars += kBlocks[static_cast<size_t>(eighths)];
  }
  return format_text("[%s] min %.2f max %.2f", bars.c_str(), least, most);
}

}  // namespace perseid::examples
