#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace perseid::comm {

class Backend;

/// Where a collective is called from. It travels in the header that ranks compare, and is what an
/// error names. Ranks must pass equal values.
struct CallSite {
  const char* operation =
      nullptr;        ///< name in errors ("dispatch"); null: the collective's own name
  int layer = -1;     ///< -1: none
  int64_t step = -1;  ///< -1: none
};

/// A group of P ranks that communicate. A value: copies share one implementation, which lives until
/// the last copy is gone. A group of one rank never communicates; callers need no special case.
///
/// Every collective (this header, comm/collectives.h, comm/exchange.h) must be entered by all ranks
/// of the group in the same order. Each begins with a 32-byte header to every peer; if ranks
/// disagree (another collective, dtype, width, layer, step, configuration, a refused argument) all
/// ranks throw the same exception with the same culprit. After PeerLost, or a disagreement about
/// the order of calls (sequence, operation, layer, step), the group is failed and each later call
/// throws at once. One thread of a rank may use a group at a time.
class Group {
 public:
  Group();  ///< a group of one, the same as self_group()
  explicit Group(std::shared_ptr<Backend> backend);

  int rank() const;
  int size() const;
  const char* backend_name() const;  ///< "self", "local", "mpi", "tcp" or "nccl"

  /// Collective. Ranks that pass equal `color` (>= 0) form a group, ordered by (key, rank).
  Group split(int color, int key) const;

  /// Collective. Hash of the settings that ranks must share; compared in every later header.
  void set_config_hash(uint32_t hash) const;

  /// How long one collective may wait for peers before it throws PeerLost; default 60 s. Local.
  void set_timeout_ms(int64_t timeout_ms) const;

  Backend& backend() const { return *backend_; }

 private:
  std::shared_ptr<Backend> backend_;
};

/// One process, one rank. Costs nothing.
Group self_group();

/// Threads of this process as ranks: starts `size` threads, each calls body(group) with its own
/// rank, and returns when all have ended. If a body throws, the group is failed, so that the others
/// do not wait; then the exception of the lowest rank that failed on its own account (not by
/// PeerLost, if there is another) is rethrown.
void run_local(int size, const std::function<void(const Group&)>& body);

/// All ranks of MPI_COMM_WORLD (a duplicate of it). Needs MPI to be initialised, see
/// comm/session.h. Throws ConfigError in a build without MPI.
Group mpi_group();

}  // namespace perseid::comm
