#pragma once
#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

namespace perseid::examples {

/// Progress of a run. On a terminal one line that is written over; elsewhere each is a line of its
/// own.
class Progress {
 public:
  /// @param out      borrowed
  /// @param columns  of the terminal, see progress_columns; 0: no terminal
  Progress(std::ostream& out, int columns);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(const std::string& line);  ///< what is going on now
  void print(const std::string& line);   ///< a line that stays

 private:
  std::ostream& out_;
  int columns_;
  bool open_ = false;  ///< the cursor stands behind a line that may be written over
};

/// Columns of the terminal behind standard output, also through mpirun; 0 if there is none, or one
/// that cannot move its cursor.
int progress_columns();

/// Name and value in two columns with a frame: the settings of a run.
struct Setting {
  std::string name;
  std::string value;
};
std::string settings_table(const std::vector<Setting>& settings);

/// A table with a header. Text of the first column is left-aligned, the rest right-aligned.
/// @param rows  each as long as `header`
std::string results_table(const std::vector<std::string>& header,
                          const std::vector<std::vector<std::string>>& rows);

/// One block per expert, as high as its load: 1 is the fair share, 0 a dead expert.
/// "[▇▆▆▇▅▆▇▆] min 0.71 max 1.21", loads being multiples of the fair share.
std::string load_bars(const std::vector<int64_t>& tokens_per_expert);

}  // namespace perseid::examples
