#pragma once
#include <string>
#include <vector>

#include "comm/launcher.h"

namespace perseid::examples {

/// What to look for.
struct DataSet {
  std::string name;        ///< folder: "fashion-mnist"
  std::string short_name;  ///< word for examples/get_data.sh: "fashion"
  std::string marker;      ///< a file whose presence shows that the folder is the right one
};

/// Folders that are tried, in this order: `requested` alone if it is given (--data), else
/// $PERSEID_DATA_DIR/<name>, /usr/share/datasets/<name>, ./data/<name>.
std::vector<std::string> data_places(const DataSet& set, const std::string& requested,
                                     const comm::Environment& environment);

/// The first place that holds the marker. Throws IoError with the places tried and the command that
/// gets the data.
std::string find_data_folder(const DataSet& set, const std::vector<std::string>& places);

}  // namespace perseid::examples
