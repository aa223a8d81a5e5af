#include "examples/common/data_folder.h"

#include <filesystem>
#include <optional>

#include "kernels/error.h"

namespace perseid::examples {

std::vector<std::string> data_places(const DataSet& set, const std::string& requested,
                                     const comm::Environment& environment) {
  if (!requested.empty()) return {requested};
  std::vector<std::string> places;
  if (const std::optional<std::string> root = environment("PERSEID_DATA_DIR")) {
    places.push_back(*root + "/" + set.name);
  }
  places.push_back("/usr/share/datasets/" + set.name);
  places.push_back("./data/" + set.name);
  return places;
}

std::string find_data_folder(const DataSet& set, const std::vector<std::string>& places) {
  std::string tried;
  for (const std::string& place : places) {
    std::error_code ignored;
    if (std::filesystem::exists(place + "/" + set.marker, ignored)) return place;
    tried += (tried.empty() ? "" : ", ") + place;
  }
  throw IoError(ErrorDetail{"find_data", "data", set.name,
                            "was not found (no " + set.marker + " in: " + tried +
                                "). Get it with: examples/get_data.sh " + set.short_name});
}

}  // namespace perseid::examples
