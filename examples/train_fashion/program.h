#pragma once
#include <iosfwd>
#include <mutex>
#include <optional>
#include <string>

#include "comm/group.h"
#include "examples/train_fashion/options.h"

namespace perseid::examples {

/// Fashion-MNIST as a task shows it, loaded once for all ranks of this process: threads as ranks
/// share it.
class SharedImages {
 public:
  /// Collective: if a rank cannot load, all ranks throw. References live as long as this object.
  const DomainData& domains(const ProgramOptions& options, const comm::Group& world);
  const MultiData& multi(const ProgramOptions& options, const comm::Group& world);
  const std::string& folder() const { return folder_; }  ///< once loaded

 private:
  template <typename Data, typename Make>
  const Data& load(std::optional<Data>& data, const ProgramOptions& options,
                   const comm::Group& world, Make&& make);

  std::mutex mutex_;
  std::string folder_;
  std::optional<DomainData> domains_;
  std::optional<MultiData> multi_;
};

/// Runs every gate and seed of the options and prints to `out` on rank 0. Collective.
void run_program(const ProgramOptions& options, SharedImages& images, const comm::Group& world,
                 std::ostream& out);

}  // namespace perseid::examples
