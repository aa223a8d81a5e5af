// What programs print, and their command lines.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>

#include "examples/common/console.h"
#include "examples/common/json_lines.h"
#include "examples/common/text.h"
#include "examples/train_fashion/multi_report.h"
#include "examples/train_fashion/options.h"
#include "examples/train_fashion/report.h"
#include "kernels/error.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

CommandLine parse(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "train_fashion");
  return parse_command_line(static_cast<int>(flags.size()), flags.data());
}

TEST(Text, Counts) {
  EXPECT_EQ(with_commas(62800), "62,800");
  EXPECT_EQ(with_commas(999), "999");
  EXPECT_EQ(with_commas(-1000000), "-1,000,000");
  EXPECT_EQ(short_count(870), "870");
  EXPECT_EQ(short_count(41200), "41.2k");
  EXPECT_EQ(short_count(1.59e6), "1.59M");
  EXPECT_EQ(cut_text("a▇b▇", 2), "a▇");
  EXPECT_EQ(cut_text("ab", 5), "ab");
  EXPECT_EQ(text_columns("a▇b▇"), 4);
}

TEST(Progress, PlainLines) {
  std::ostringstream out;
  Progress progress(out, 0);
  progress.update("step 1");
  progress.update("step 2");
  progress.print("done");
  EXPECT_EQ(out.str(), "step 1\nstep 2\ndone\n");
}

TEST(Progress, OneLine) {
  std::ostringstream out;
  {
    Progress progress(out, 20);
    progress.update("step 1");
    progress.update("step 2");
    progress.print("done");
    progress.update("a line that is wider than the terminal");
  }
  EXPECT_EQ(out.str(), "\r\033[Kstep 1\r\033[Kstep 2\r\033[Kdone\n\r\033[Ka line that is wide\n");
}

TEST(Tables, Aligned) {
  EXPECT_EQ(settings_table({{"gate", "topk"}, {"lr", "0.001"}}),
            "+------+-------+\n| gate | topk  |\n| lr   | 0.001 |\n+------+-------+\n");
  EXPECT_EQ(results_table({"gate", "x"}, {{"a", "1.5"}, {"b", "2 ±1"}}),
            "+------+------+\n| gate |    x |\n+------+------+\n| a    |  1.5 |\n| b    | 2 ±1 |\n"
            "+------+------+\n");
}

TEST(Tables, LoadBars) {
  EXPECT_EQ(load_bars({100, 200, 0, 100}), "[▄█ ▄] min 0.00 max 2.00");
  EXPECT_EQ(load_bars({0, 0}), "[  ] min 0.00 max 0.00");
  EXPECT_EQ(load_bars({1, 100000}), "[▁█] min 0.00 max 2.00");
}

TEST(Json, RoundTrips) {
  const double third = 1.0 / 3;
  const std::string text = to_json({{"gate", std::string("a\"b")},
                                    {"n", int64_t{3}},
                                    {"x", third},
                                    {"bad", std::numeric_limits<double>::quiet_NaN()},
                                    {"v", std::vector<double>{.1}}});
  EXPECT_EQ(text,
            "{\"gate\":\"a\\\"b\",\"n\":3,\"x\":0.3333333333333333,\"bad\":null,\"v\":[0.1]}");
}

TEST(Json, LinesAndErrors) {
  const std::string path = ::testing::TempDir() + "perseid_lines.json";
  {
    JsonLines lines(path);
    lines.write({{"a", int64_t{1}}});
    lines.write({{"a", int64_t{2}}});
  }
  std::ifstream file(path);
  std::stringstream content;
  content << file.rdbuf();
  EXPECT_EQ(content.str(), "{\"a\":1}\n{\"a\":2}\n");
  const std::string text = error_text<IoError>([] { JsonLines lines("/no/such/folder/x"); });
  EXPECT_NE(text.find("/no/such/folder/x"), std::string::npos) << text;
  JsonLines none("");
  none.write({{"a", int64_t{1}}});
}

TEST(CommandLine, DefaultsAreTheRecipe) {
  const CommandLine line = parse({});
  ASSERT_TRUE(line.run) << line.text;
  const TrainOptions& train = line.options.train;
  EXPECT_EQ(line.options.gates, (std::vector<GateKind>{GateKind::kTopK}));
  EXPECT_EQ(line.options.seeds, (std::vector<uint64_t>{0}));
  EXPECT_EQ(train.num_experts, 8);
  EXPECT_EQ(train.top_k, 2);
  EXPECT_EQ(train.global_batch_size, 256);
  EXPECT_EQ(train.epochs, 6);
  EXPECT_EQ(train.aux_loss_coeff, 0);
  EXPECT_EQ(train.lr, 8e-3);
  EXPECT_EQ(train.gate_lr_factor, 2);
  EXPECT_EQ(train.lr_decay, .5);
  EXPECT_EQ(train.balance_coeff, .25);
  EXPECT_EQ(train.gamma, 1);
  EXPECT_EQ(train.entropy_coeff, 1);
  EXPECT_EQ(train.entropy_ramp, .5);
  EXPECT_FALSE(train.hard_eval);
  EXPECT_EQ(line.options.validation_images, 0);
  EXPECT_EQ(num_steps(train, 60000), 1404);
}

TEST(CommandLine, BothNamesOfAFlag) {
  struct Case {
    const char* megatron;
    const char* ours;
    const char* value;
    double TrainOptions::*real;
    int64_t TrainOptions::*integer;
  };
  for (const Case& c :
       {Case{"--moe-router-topk", "--top-k", "3", nullptr, &TrainOptions::top_k},
        Case{"--expert-model-parallel-size", "--ep-size", "2", nullptr, &TrainOptions::ep_size},
        Case{"--moe-expert-capacity-factor", "--capacity-factor", "1.5",
             &TrainOptions::capacity_factor, nullptr},
        Case{"--moe-aux-loss-coeff", "--aux-loss-coeff", "0.25", &TrainOptions::aux_loss_coeff,
             nullptr},
        Case{"--moe-z-loss-coeff", "--z-loss-coeff", "0.125", &TrainOptions::z_loss_coeff,
             nullptr}}) {
    for (const char* name : {c.megatron, c.ours}) {
      const CommandLine line = parse({name, c.value});
      ASSERT_TRUE(line.run) << line.text;
      const double value = c.real != nullptr ? line.options.train.*c.real
                                             : static_cast<double>(line.options.train.*c.integer);
      EXPECT_EQ(value, std::atof(c.value)) << name;
    }
  }
}

TEST(CommandLine, SettingsOfTheRecipe) {
  struct Case {
    const char* flag;
    double TrainOptions::*member;
  };
  for (const Case& c : {Case{"--balance-coeff", &TrainOptions::balance_coeff},
                        Case{"--gamma", &TrainOptions::gamma},
                        Case{"--entropy-coeff", &TrainOptions::entropy_coeff},
                        Case{"--entropy-ramp", &TrainOptions::entropy_ramp},
                        Case{"--gate-lr-factor", &TrainOptions::gate_lr_factor},
                        Case{"--lr-decay", &TrainOptions::lr_decay}}) {
    const CommandLine line = parse({c.flag, "0.75"});
    ASSERT_TRUE(line.run) << line.text;
    EXPECT_EQ(line.options.train.*c.member, .75) << c.flag;
    EXPECT_NE(config_hash(line.options), config_hash(parse({}).options)) << c.flag;
  }
  EXPECT_TRUE(parse({"--hard-eval"}).options.train.hard_eval);
  EXPECT_EQ(parse({"--validation-images", "10000"}).options.validation_images, 10000);
}

TEST(CommandLine, DefaultsOfTheTask) {
  CommandLine line = parse({"--task", "multi"});
  ASSERT_TRUE(line.run) << line.text;
  EXPECT_EQ(line.options.task, Task::kMulti);
  EXPECT_EQ(line.options.protocol, Protocol::kSmall);
  EXPECT_EQ(line.options.experts, ExpertKind::kMlp);
  EXPECT_EQ(line.options.train.num_experts, 6);
  EXPECT_EQ(line.options.train.lr, 5e-4);
  EXPECT_FALSE(line.options.train.input_norm);
  // Flags win, wherever they stand.
  line = parse({"--lr", "0.25", "--protocol", "published", "--gate", "all", "--task=multi",
                "--input-norm", "layer_norm"});
  ASSERT_TRUE(line.run) << line.text;
  EXPECT_EQ(line.options.protocol, Protocol::kPublished);
  EXPECT_EQ(line.options.experts, ExpertKind::kConv);
  EXPECT_EQ(line.options.train.epochs, 200);
  EXPECT_EQ(line.options.train.lr, .25);
  EXPECT_TRUE(line.options.train.input_norm);
  EXPECT_EQ(line.options.gates,
            (std::vector<GateKind>{GateKind::kSingle, GateKind::kTopK, GateKind::kDSelectK,
                                   GateKind::kComet, GateKind::kDense}));
  line = parse({"--task", "multi", "--help"});
  EXPECT_NE(line.text.find("over all ranks"), std::string::npos);
  EXPECT_NE(line.text.find("=0.0005"), std::string::npos) << line.text;
}

TEST(CommandLine, SeveralSeedsAndAllGates) {
  const CommandLine line = parse({"--gate", "all", "--seeds", "0", "1", "2"});
  ASSERT_TRUE(line.run) << line.text;
  EXPECT_EQ(
      line.options.gates,
      (std::vector<GateKind>{GateKind::kSingle, GateKind::kHash, GateKind::kOracle, GateKind::kTopK,
                             GateKind::kDSelectK, GateKind::kComet, GateKind::kDense}));
  EXPECT_EQ(line.options.seeds, (std::vector<uint64_t>{0, 1, 2}));
}

TEST(CommandLine, WrongValues) {
  struct Case {
    std::vector<const char*> flags;
    std::vector<const char*> parts;  // of the text: flag, value, limit
  };
  for (const Case& c : std::vector<Case>{
           {{"--gate", "commet"},
            {"--gate", "commet", "{single,hash,oracle,topk,dselectk,comet,dense,all}"}},
           {{"--task", "single"}, {"--task", "single", "{domains,multi}"}},
           {{"--task", "multi", "--gate", "hash"},
            {"--gate", "value hash", "{single,topk,dselectk,comet,dense,all}"}},
           {{"--task", "multi", "--validation-images", "9"},
            {"--validation-images", "--task domains"}},
           {{"--protocol", "small"}, {"--protocol", "--task multi"}},
           {{"--experts", "conv"}, {"--experts", "--task multi"}},
           {{"--task", "multi", "--protocol", "big"}, {"big", "{published,small}"}},
           {{"--task", "multi", "--experts", "rnn"}, {"rnn", "{conv,mlp}"}},
           {{"--input-norm", "batch"}, {"batch", "{none,layer_norm}"}},
           {{"--adam-eps", "0"}, {"--adam-eps", "value 0", "to 1"}},
           {{"--gamma", "0"}, {"--gamma", "value 0", "1e-06 to"}},
           {{"--entropy-ramp", "1.5"}, {"--entropy-ramp", "value 1.5", "0 to 1"}},
           {{"--entropy-coeff", "-1"}, {"--entropy-coeff", "value -1", "0 to"}},
           {{"--balance-coeff", "-1"}, {"--balance-coeff", "value -1", "0 to"}},
           {{"--gate-lr-factor", "0"}, {"--gate-lr-factor", "value 0", "1e-06 to"}},
           {{"--lr-decay", "2"}, {"--lr-decay", "value 2", "0 to 1"}},
           {{"--validation-images", "-1"}, {"--validation-images", "value -1", "0 to"}},
           {{"--num-experts", "0"}, {"--num-experts", "value 0", "1 to 4096"}},
           {{"--num-experts", "-3"}, {"--num-experts", "value -3", "1 to 4096"}},
           {{"--num-experts", "many"}, {"--num-experts", "many", "1 to 4096"}},
           {{"--top-k", "9"}, {"--moe-router-topk", "value 9", "--num-experts 8"}},
           {{"--lr", "-1"}, {"--lr", "value -1", "to 1000"}},
           {{"--lr", "nan"}, {"--lr", "value nan", "to 1000"}},
           {{"--epochs", "0"}, {"--epochs", "value 0", "1 to"}},
           {{"--global-batch-size", "0"}, {"--global-batch-size", "value 0", "1 to"}},
           {{"--train-iters", "-1"}, {"--train-iters", "value -1", "0 to"}},
           {{"--log-interval", "0"}, {"--log-interval", "value 0", "1 to"}},
           {{"--aux-loss-coeff", "-1"}, {"--moe-aux-loss-coeff", "value -1", "0 to"}},
           {{"--capacity-factor", "-1"}, {"--moe-expert-capacity-factor", "value -1", "0 to"}},
           {{"--seed", "-1"}, {"--seed", "value -1", "0 to"}},
           {{"--dtype", "int8"}, {"--dtype", "int8", "{bfloat16,float32,float64}"}},
           {{"--comm", "udp"}, {"--comm", "udp", "{auto,self,local,mpi,tcp,nccl}"}},
           {{"--device", "gpu"}, {"--device", "gpu", "{auto,cpu,cuda}"}},
           {{"--local-ranks", "0"}, {"--local-ranks", "value 0", "1 to 256"}},
           {{"--local-ranks", "2"}, {"--local-ranks", "needs --comm local"}},
           {{"--launcher", "ssh"}, {"--launcher", "ssh", "{auto,mpi,slurm,torchrun,single}"}},
           {{"--gate", "all", "--dump", "x"}, {"--dump", "one gate and one seed"}},
           {{"--no-such-flag"}, {"--no-such-flag"}},
           {{"--gate"}, {"--gate"}}}) {
    const CommandLine line = parse(c.flags);
    EXPECT_FALSE(line.run);
    EXPECT_EQ(line.exit_code, 64);
    for (const char* part : c.parts)
      EXPECT_NE(line.text.find(part), std::string::npos) << line.text;
  }
}

TEST(CommandLine, HelpShowsDefaultsAndRanges) {
  const CommandLine line = parse({"--help"});
  EXPECT_FALSE(line.run);
  EXPECT_EQ(line.exit_code, 0);
  for (const char* part :
       {"--moe-router-topk,--top-k", "1 to 4096", "=8", "images of a step",
        "{single,hash,oracle,topk,dselectk,comet,dense,all}", "the protocol of this task has 0"}) {
    EXPECT_NE(line.text.find(part), std::string::npos) << part << " in:\n" << line.text;
  }
}

TEST(CommandLine, ConfigHashTellsSettingsApart) {
  const uint32_t first = config_hash(parse({}).options);
  EXPECT_EQ(first, config_hash(parse({"--json", "elsewhere"}).options));
  for (const std::vector<const char*>& flags :
       std::vector<std::vector<const char*>>{{"--gate", "dense"},
                                             {"--seed", "1"},
                                             {"--lr", "0.002"},
                                             {"--dtype", "float64"},
                                             {"--data-seed", "1"},
                                             {"--ep-size", "1"},
                                             {"--hard-eval"},
                                             {"--validation-images", "9"},
                                             {"--train-iters", "1"}}) {
    EXPECT_NE(first, config_hash(parse(flags).options)) << flags[0];
  }
}

TEST(Report, Lines) {
  StepReport report;
  report.step = 100;
  report.num_steps = 1404;
  report.cross_entropy = .53127;
  report.gate_losses = {{"aux_loss", 1.0204}};
  report.tokens_per_expert = {100, 0, 100, 200};
  report.experts_per_token = 2.004;
  report.max_vio = 1;
  report.step_ms = 1.234;
  report.tokens_per_second = 207000;
  EXPECT_EQ(step_line(report),
            "step  100/1404 | loss 0.5313 | aux 1.020 | experts/token 2.00 | maxvio 1.00 | dead "
            "1/4 | 1.23 ms | "
            "207.0k tok/s");
  report.num_dropped = 7;
  EXPECT_NE(step_line(report).find("| drop 7 |"), std::string::npos);
}

TEST(Report, FinalTable) {
  RunResult one;
  one.accuracy = .8;
  RunResult two;
  two.accuracy = .82;
  const std::string table = final_table(
      {{GateKind::kHash, 0, one}, {GateKind::kTopK, 0, one}, {GateKind::kTopK, 1, two}});
  EXPECT_NE(table.find("| hash |"), std::string::npos) << table;
  EXPECT_NE(table.find("| topk | 0.8100 ±0.0100 |"), std::string::npos) << table;
  for (const char* column : {"accuracy", "cross-entropy", "experts, training", "experts, test",
                             "max_vio", "NMI", "s/epoch", "rows/image"}) {
    EXPECT_NE(table.find(column), std::string::npos) << table;
  }
}

TEST(Report, ResultJson) {
  RunResult result;
  result.num_steps = 9;
  result.domain_expert = {1.0 / 3, 2.0 / 3};
  for (int64_t step : {5, 9}) {
    StepReport point;
    point.step = step;
    point.cross_entropy = 1.0 / static_cast<double>(step);
    point.experts_per_token = 4;
    result.curve.push_back(point);
  }
  const TrainOptions options;
  std::string text = to_json(result_json({GateKind::kTopK, 7, result}, options, 2));
  for (const char* part :
       {"\"gate\":\"topk\"", "\"seed\":7", "\"ranks\":2", "\"training_experts_per_token\":4.0",
        "\"domains\":[\"plain\",\"inverted\",\"rotated\",\"permuted\"]",
        "\"domain_expert\":[0.333333,0.666667]", "\"curve_step\":[5,9]",
        "\"curve_cross_entropy\":[0.2,0.111111]"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
  }
  EXPECT_EQ(text.find("tree_"), std::string::npos);
  result.trees = {1, {3, 2, 1}, {2}, {1}};
  text = to_json(result_json({GateKind::kComet, 7, result}, options, 2));
  EXPECT_NE(text.find("\"tree_reached\":[3,2,1],\"tree_left\":[2],\"tree_right\":[1]"),
            std::string::npos)
      << text;
}

TEST(MultiReport, TablesAndJson) {
  const auto run_with = [](GateKind gate, uint64_t seed, double accuracy) {
    FinishedMulti run{gate, seed, {}};
    run.result.epochs.resize(2);
    run.result.best_epoch = 2;
    run.result.epochs[1].train.tasks[1].experts_per_token = 2.5;
    run.result.epochs[1].validation.tasks[0].accuracy = .75;
    run.result.test.tasks[0].accuracy = accuracy;
    run.result.test.tasks[1].accuracy = .7;
    run.result.test.tasks[1].tokens_per_expert = {3, 1};
    run.result.test.rows_per_sample = 3.25;
    return run;
  };
  const FinishedMulti one = run_with(GateKind::kTopK, 0, .8);
  const std::string table =
      final_table({one, run_with(GateKind::kTopK, 1, .82), run_with(GateKind::kComet, 0, .9)});
  EXPECT_NE(table.find("| topk  |     top left | 0.8100 ±0.0100 |"), std::string::npos) << table;
  EXPECT_NE(table.find("|       | bottom right | 0.7000 ±0.0000 |"), std::string::npos) << table;
  EXPECT_NE(table.find("| comet |     top left |         0.9000 |"), std::string::npos) << table;
  EXPECT_NE(table.find("2.50 ±0.00"), std::string::npos) << table;
  EXPECT_NE(table.find("3.25"), std::string::npos) << table;
  const std::string lines = result_line(one);
  EXPECT_NE(lines.find("epoch 2, bottom right | accuracy 0.7000"), std::string::npos) << lines;
  EXPECT_NE(epoch_line(one.result.epochs[1]).find("validation accuracy 0.7500 0.0000"),
            std::string::npos);
  const std::string json = to_json(result_json(one, multi_defaults(Protocol::kSmall), 2));
  for (const char* part :
       {R"("task":"multi","gate":"topk","seed":0,"ranks":2)", R"("accuracy":[0.8,0.7])",
        R"("tokens_per_expert_bottom_right":[3,1])",
        R"("train_experts_per_token_bottom_right":[0.0,2.5])",
        R"("validation_accuracy_top_left":[0.0,0.75])", R"("rows_per_sample":3.25)"}) {
    EXPECT_NE(json.find(part), std::string::npos) << part << " in " << json;
  }
}

}  // namespace
}  // namespace perseid::examples
