// Ranks are processes. A message is its number of bytes and these bytes; both sides know the number
// before, so another one is an error. A rank that leaves says why, as a message of -1 bytes.
#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "comm/tcp_mesh.h"
#include "kernels/error.h"

namespace perseid::comm {
namespace {

constexpr int64_t kFirstContext = 1;
constexpr int64_t kPrefixBytes = 8;
constexpr int64_t kNotePrefix = -1;

/// Why a rank left.
struct Note {
  int32_t culprit = -1;
  std::array<char, 252> why{};
};

/// Both directions of a connection in the transfer under way. Totals include the prefix.
struct Link {
  Socket socket;
  int64_t send_prefix = 0, sent = 0, send_total = 0;
  int64_t recv_prefix = 0, received = 0, recv_total = 0;

  bool is_sending() const { return sent < send_total; }
  bool is_receiving() const { return received < recv_total; }
};

enum class Step { kOn, kBlocked, kClosed };

Step step_of(ssize_t bytes) {
  if (bytes > 0) return Step::kOn;
  if (bytes < 0 && errno == EINTR) return Step::kOn;
  return bytes < 0 && errno == EAGAIN ? Step::kBlocked : Step::kClosed;
}

class TcpBackend final : public Backend {
 public:
  TcpBackend(std::shared_ptr<TcpMesh> mesh, std::vector<int> world_ranks, int rank, int64_t context,
             Clock::time_point deadline)
      : Backend(rank, static_cast<int>(world_ranks.size())),
        mesh_(std::move(mesh)),
        world_ranks_(std::move(world_ranks)),
        links_(world_ranks_.size()) {
    mesh_->take_context(context);
    std::vector<Socket> sockets = mesh_->connect(world_ranks_, context, deadline);
    for (size_t p = 0; p < links_.size(); ++p) links_[p].socket = std::move(sockets[p]);
  }
  ~TcpBackend() override {
    // Unread bytes would make the system discard what a peer has not read yet.
    std::array<char, 4096> rest;
    for (const Link& link : links_) {
      while (link.socket.is_open() && ::recv(link.socket.fd(), rest.data(), rest.size(), 0) > 0) {
      }
    }
  }

  const char* name() const override { return "tcp"; }
  int64_t proposed_context() const override { return mesh_->next_context(); }

  TransferResult exchange(const Transfer& transfer) override {
    for (int p = 0; p < size(); ++p) {
      Link& link = links_[static_cast<size_t>(p)];
      const PeerBlock& block = transfer.blocks[p];
      const bool is_peer = p != rank();
      link.send_prefix = block.send_units * transfer.unit_bytes;
      link.sent = 0;
      link.send_total = is_peer && link.send_prefix > 0 ? link.send_prefix + kPrefixBytes : 0;
      link.received = 0;
      const int64_t recv_bytes = block.recv_units * transfer.unit_bytes;
      link.recv_total = is_peer && recv_bytes > 0 ? recv_bytes + kPrefixBytes : 0;
    }
    const PeerBlock& own = transfer.blocks[rank()];
    const int64_t own_bytes = own.recv_units * transfer.unit_bytes;
    if (own_bytes > 0) std::memcpy(own.recv, own.send, static_cast<size_t>(own_bytes));

    TransferResult result;
    while (is_moving()) {
      for (int k = 1; k < size(); ++k) {  // peers start behind this rank
        const int p = (rank() + k) % size();
        advance(p, transfer.blocks[p], result);
        if (result.state != TransferResult::State::kDone) return result;
      }
      if (!is_moving() || wait(transfer.deadline)) continue;
      list_missing(result);
      return result;
    }
    return result;
  }

  std::shared_ptr<Backend> split(const Subgroup& subgroup) override {
    std::vector<int> world_ranks;
    int new_rank = 0;
    for (const int member : subgroup.members) {
      if (member == rank()) new_rank = static_cast<int>(world_ranks.size());
      world_ranks.push_back(world_ranks_[static_cast<size_t>(member)]);
    }
    const auto deadline = Clock::now() + std::chrono::milliseconds(state().timeout_ms);
    return std::make_shared<TcpBackend>(mesh_, std::move(world_ranks), new_rank, subgroup.context,
                                        deadline);
  }

  void leave(const std::string& why, int culprit) override {
    struct {
      int64_t prefix = kNotePrefix;
      Note note;
    } message;
    message.note.culprit = culprit;
    std::copy_n(why.begin(), std::min(why.size(), message.note.why.size() - 1),
                message.note.why.begin());
    for (const Link& link : links_) {
      if (!link.socket.is_open()) continue;
      const bool is_between_messages = !link.is_sending() || link.sent == 0;
      if (is_between_messages) {
        (void)::send(link.socket.fd(), &message, kPrefixBytes + sizeof(Note), MSG_NOSIGNAL);
      }
      ::shutdown(link.socket.fd(), SHUT_WR);
    }
  }

 private:
  bool is_moving() const {
    return std::any_of(links_.begin(), links_.end(),
                       [](const Link& link) { return link.is_sending() || link.is_receiving(); });
  }

  // Sends and receives what can be without waiting.
  void advance(int p, const PeerBlock& block, TransferResult& result) {
    Link& link = links_[static_cast<size_t>(p)];
    Step sending = Step::kOn;
    while (link.is_sending() && sending == Step::kOn) sending = send_part(link, block.send);
    Step receiving = Step::kOn;
    while (link.is_receiving() && receiving == Step::kOn) {
      receiving = recv_part(link, block.recv);
      if (link.received < kPrefixBytes || link.recv_prefix + kPrefixBytes == link.recv_total) {
        continue;
      }
      if (link.recv_prefix == kNotePrefix) return report_gone(p, true, result);
      result.state = TransferResult::State::kBroken;
      result.missing = {p};
      result.text = "bytes=" + to_text(link.recv_prefix) + " from rank " + to_text(p) +
                    " instead of " + to_text(link.recv_total - kPrefixBytes);
      return;
    }
    if (receiving == Step::kClosed) return report_gone(p, false, result);
    // Whoever closes both ways may have left a note, too.
    if (sending == Step::kClosed) report_gone(p, link.received == 0 && skip_to_note(link), result);
  }

  static Step send_part(Link& link, const void* data) {
    std::array<iovec, 2> parts{};
    msghdr message{};
    message.msg_iov = parts.data();
    if (link.sent < kPrefixBytes) {
      parts[message.msg_iovlen++] = {reinterpret_cast<char*>(&link.send_prefix) + link.sent,
                                     static_cast<size_t>(kPrefixBytes - link.sent)};
    }
    const int64_t begin = std::max<int64_t>(link.sent - kPrefixBytes, 0);
    parts[message.msg_iovlen++] = {const_cast<char*>(static_cast<const char*>(data)) + begin,
                                   static_cast<size_t>(link.send_prefix - begin)};
    const ssize_t sent = ::sendmsg(link.socket.fd(), &message, MSG_NOSIGNAL);
    if (sent > 0) link.sent += sent;
    return step_of(sent);
  }

  static Step recv_part(Link& link, void* data) {
    const bool is_prefix = link.received < kPrefixBytes;
    const int64_t end = is_prefix ? kPrefixBytes : link.recv_total;
    char* into = is_prefix ? reinterpret_cast<char*>(&link.recv_prefix) + link.received
                           : static_cast<char*>(data) + link.received - kPrefixBytes;
    const ssize_t received =
        ::recv(link.socket.fd(), into, static_cast<size_t>(end - link.received), 0);
    if (received > 0) link.received += received;
    return step_of(received);
  }

  static bool skip_to_note(const Link& link) {
    int64_t prefix = 0;
    return ::recv(link.socket.fd(), &prefix, kPrefixBytes, 0) == kPrefixBytes &&
           prefix == kNotePrefix;
  }

  void report_gone(int p, bool has_note, TransferResult& result) {
    Note note;
    const auto deadline = Clock::now() + std::chrono::milliseconds(100);
    const Socket& socket = links_[static_cast<size_t>(p)].socket;
    has_note = has_note && recv_all(socket, &note, sizeof(note), deadline);
    note.why.back() = '\0';
    const bool is_other =
        has_note && note.culprit >= 0 && note.culprit < size() && note.culprit != rank();
    result.state = TransferResult::State::kGone;
    result.gone = p;
    result.missing = {is_other ? note.culprit : p};
    result.text = has_note ? note.why.data() : "its connection is closed";
  }

  // Until something can be sent or received. Returns false at the deadline.
  bool wait(Clock::time_point deadline) {
    polled_.clear();
    for (const Link& link : links_) {
      const int events = (link.is_sending() ? POLLOUT : 0) | (link.is_receiving() ? POLLIN : 0);
      if (events != 0) polled_.push_back({link.socket.fd(), static_cast<short>(events), 0});
    }
    if (::poll(polled_.data(), polled_.size(), poll_ms(deadline)) > 0) return true;
    return Clock::now() <= deadline;
  }

  void list_missing(TransferResult& result) const {
    result.state = TransferResult::State::kTimedOut;
    result.is_silent = std::any_of(links_.begin(), links_.end(),
                                   [](const Link& link) { return link.is_receiving(); });
    for (int p = 0; p < size(); ++p) {
      const Link& link = links_[static_cast<size_t>(p)];
      if (result.is_silent ? link.is_receiving() : link.is_sending()) result.missing.push_back(p);
    }
  }

  std::shared_ptr<TcpMesh> mesh_;
  std::vector<int> world_ranks_;  // [P]
  std::vector<Link> links_;       // [P], own one closed
  std::vector<pollfd> polled_;
};

}  // namespace

Group tcp_group(const TcpAddress& address, int rank, int size, int64_t timeout_ms) {
  require(size >= 1, "tcp_group", "size", size, "is below 1; choose the number of ranks");
  require(rank >= 0 && rank < size, "tcp_group", "rank", rank,
          "is outside [0, " + to_text(size) + "); choose the number of this rank");
  require(timeout_ms > 0, "tcp_group", "timeout_ms", timeout_ms, "is not above 0; choose 60000");
  if (size == 1) return self_group();
  const auto deadline = Clock::now() + std::chrono::milliseconds(timeout_ms);
  std::vector<int> world_ranks;
  for (int r = 0; r < size; ++r) world_ranks.push_back(r);
  return Group(
      std::make_shared<TcpBackend>(std::make_shared<TcpMesh>(address, rank, size, deadline),
                                   std::move(world_ranks), rank, kFirstContext, deadline));
}

}  // namespace perseid::comm
