#pragma once
#include <iosfwd>
#include <mutex>
#include <optional>
#include <string>

#include "comm/group.h"
#include "examples/train_fashion/options.h"

namespace perseid::examples {

/// Fashion-MNIST in domains, loaded once for all ranks of this process: threads as ranks share it.
class SharedImages {
 public:
  /// Collective: if a rank cannot load, all ranks throw. The reference lives as long as this
  /// object.
  const DomainData& load(const ProgramOptions& options, const comm::Group& world);
  const std::string& folder() const { return folder_; }  ///< after load

 private:
  std::mutex mutex_;
  std::string folder_;
  std::optional<DomainData> images_;
};

/// Runs every gate and seed of the options and prints to `out` on rank 0. Collective.
void run_program(const ProgramOptions& options, SharedImages& images, const comm::Group& world,
                 std::ostream& out);

}  // namespace perseid::examples
